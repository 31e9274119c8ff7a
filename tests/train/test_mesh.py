"""Training on two devices: what one device computes, with half of its activations."""

import json
from pathlib import Path

import jax
import numpy as np
import on_devices
import pytest

from train import mesh as devices

SCRIPT = """
    import json, sys
    import jax
    import numpy as np
    from train.run import loop
    from train.run import step
    from train.run.checkpoint import Checkpointer
    from train.config import TrainConfig
    from train.evaluation.scoring import evaluate
    from pathlib import Path

    data, out = map(Path, sys.argv[1:])
    assert jax.device_count() == 2

    def take(state, batch, config):
        return step.train_step(state, batch, 1e-3, config.loss, config.step)

    def run(count):
        config = TrainConfig.of(
            data=(data,), devices=count, batch_size=16, accumulate=2, max_length=32, vocab_size=300,
            steps=6, held_out=0.2, label_smoothing=0.1, out=out / str(count),
        )
        ready = loop.prepare(config)
        state, losses, batch = ready.state, [], next(ready.data.train)
        compiled = step.train_step.lower(state, batch, 1e-3, config.loss, config.step).compile()
        for number in range(6):
            state, metrics = take(state, batch, config)
            losses.append([float(x) for x in metrics])
            if number == 2:
                ready.checkpointer.save(3, state, ready.data.train.state())
            batch = next(ready.data.train)
        memory = compiled.memory_analysis().temp_size_in_bytes
        return config, ready, state, losses, memory, evaluate(
            state.model, ready.exam, loop.scoring_options(config))

    *_, one, memory, evaluation = run(1)
    assert len({tuple(row) for row in one}) == 6
    config, ready, state, two, half, same = run(2)
    np.testing.assert_allclose(two, one, rtol=1e-4)
    np.testing.assert_allclose(same.tokens.confidence, evaluation.tokens.confidence, rtol=1e-4)
    np.testing.assert_allclose(same.tokens.nll, evaluation.tokens.nll, rtol=1e-5)
    assert half < 0.75 * memory, (half, memory)
    for x in jax.tree.leaves(state):
        assert len(x.sharding.device_set) == 2 and x.sharding.is_fully_replicated
    assert step.train_step._cache_size() == 2  # one program for each number of devices

    # From the checkpoint after three steps on, to the same bits.
    again, position = ready.checkpointer.state(3, like=state), ready.checkpointer.position(3)
    ready.data.train.set_state(position)
    for number in range(3, 6):
        again, metrics = take(again, next(ready.data.train), config)
        assert [float(x) for x in metrics] == two[number]
    for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(x, y)
    print("the same")
"""


@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path: Path):
    random = np.random.default_rng(0)
    words = np.array(["ant", "bee", "cat"])

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(words, random.integers(low, high)))

    rows = [{"prompt": text(2, 5), "completion": text(3, 12)} for _ in range(80)]
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert on_devices.run(2, SCRIPT, arguments=(data, tmp_path / "runs")) == "the same"


def test_more_devices_than_there_are():
    there = jax.local_device_count()
    devices.check(there)
    with pytest.raises(ValueError, match=f"at most {there}, the devices .*, not {there + 1}"):
        devices.check(there + 1)


def test_one_device_is_left_to_jax():
    batch = {"tokens": np.zeros((2, 4, 8), np.int32)}
    assert devices.split(batch, 1, axis=1) is batch
    assert devices.whole(1) is None
