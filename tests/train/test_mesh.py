"""Training on several devices: what one device computes, with a share of its memory."""

import json
from pathlib import Path

import jax
import numpy as np
import on_devices
import pytest
from jax.sharding import PartitionSpec as P

from train import mesh
from train.models.config import PRESETS
from train.models.weights.load import shapes
from train.run.options import MeshShape

SCRIPT = """
    import dataclasses, json, sys
    import jax
    import numpy as np
    from train import export, mesh
    from train.models import resolve
    from train.models.config import PRESETS, Lora
    from train.models.weights.load import shapes
    from train.run.optimizer import optimizer
    from train.run.options import MeshShape
    from train.run import loop
    from train.run import step
    from train.run.prepare import prepare
    from train.run.state import state_maker
    from train.run.checkpoint import Checkpointer
    from train.config import TrainConfig
    from train.evaluation.scoring import evaluate
    from pathlib import Path

    data, out = map(Path, sys.argv[1:])
    assert jax.device_count() == 4

    def take(state, batch, config):
        return step.train_step(state, batch, 1e-3, config.loss, config.step)

    def made_ready(layout, **flags):
        return prepare(TrainConfig.of(
            data=(data,), mesh=layout, batch_size=16, accumulate=2, max_length=32, vocab_size=300,
            steps=6, held_out=0.2, label_smoothing=0.1, remat="block", **flags,
        ))

    def run(layout):
        ready = made_ready(layout, out=out / layout)
        config, state, losses, batch = ready.config, ready.state, [], next(ready.data.train)
        compiled = step.train_step.lower(state, batch, 1e-3, config.loss, config.step).compile()
        for number in range(6):
            state, metrics = take(state, batch, config)
            losses.append([float(x) for x in metrics])
            if number == 2:
                ready.checkpointer.save(3, state, ready.data.train.state())
            batch = next(ready.data.train)
        evaluation = evaluate(state.model, ready.exam, loop.scoring_options(config))
        return ready, state, losses, compiled.memory_analysis(), evaluation

    def go_on(ready, state, losses):
        for number in range(3, 6):
            state, metrics = take(state, next(ready.data.train), ready.config)
            losses.append([float(x) for x in metrics])
        return state

    _, _, one, memory, evaluation = run("data=1")
    assert len({tuple(row) for row in one}) == 6
    ready, state, four, share, same = run("data=2,fsdp=2")
    np.testing.assert_allclose(four, one, rtol=1e-4)
    np.testing.assert_allclose(same.tokens.confidence, evaluation.tokens.confidence, rtol=1e-4)
    np.testing.assert_allclose(same.tokens.nll, evaluation.tokens.nll, rtol=1e-5)

    # Half of the state, and of what is computed of a quarter of the rows less than half.
    assert share.argument_size_in_bytes < 0.51 * memory.argument_size_in_bytes, (share, memory)
    assert share.temp_size_in_bytes < 0.5 * memory.temp_size_in_bytes, (share, memory)
    assert share.alias_size_in_bytes > 0.99 * share.output_size_in_bytes
    for x in jax.tree.leaves(state):
        assert len(x.sharding.device_set) == 4
        assert x.size < 2000 or x.sharding.shard_shape(x.shape)[-2:] != x.shape[-2:], x.shape
    assert step.train_step._cache_size() == 2  # one program for each mesh

    # From the checkpoint after three steps on, on its own mesh to the same bits.
    like = mesh.placed(state, mesh.make(ready.config.step.mesh_shape))
    again, position = ready.checkpointer.state(3, like=like), ready.checkpointer.position(3)
    third = jax.device_get(again.params)
    ready.data.train.set_state(position)
    losses = four[:3]
    again = go_on(ready, again, losses)
    assert losses == four
    for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
        assert x.sharding == y.sharding
        np.testing.assert_array_equal(x, y)

    # On one device but for rounding, and the other way round.
    for here, there in (("data=1", "data=2,fsdp=2"), ("data=2,fsdp=2", "data=1")):
        moved = made_ready(here, out=out / there, resume=True)
        assert moved.first_step == 3
        losses = one[:3]
        go_on(moved, moved.state, losses)
        np.testing.assert_allclose(losses, one, rtol=1e-4)

    # Exported on one device, and loaded so that each device has its share.
    export.export(str(out / "data=2,fsdp=2"), out / "exported")
    loaded = resolve.find(str(out / "exported")).load(mesh.make(ready.config.step.mesh_shape))
    for x, y, z in zip(*map(jax.tree.leaves, (loaded, third, again.params)), strict=True):
        assert x.sharding == z.sharding
        np.testing.assert_array_equal(x, y)

    # Bfloat16 weights that mostly stay as they are, adapters and a head of its own, all together.
    def adapted(devices):
        lora = Lora(rank=2, alpha=4.0, targets=("attention.query", "head"))
        shape = dataclasses.replace(
            PRESETS["nano"], vocab_size=300, tied_head=False, lora=lora, weights="bfloat16"
        )
        frozen = tuple(name for name in map(".".join, shapes(shape)) if "adapter" not in name)
        make = state_maker(
            shape, optimizer(ready.config.optimizer), mesh.make(devices), frozen
        )
        ready.data.train.set_state(position)
        state, losses = make(0), []
        for _ in range(2):
            state, metrics = take(state, next(ready.data.train), ready.config)
            losses.append([float(x) for x in metrics])
        return losses, state

    one, _ = adapted(MeshShape())
    four, state = adapted(MeshShape(data=2, fsdp=2))
    np.testing.assert_allclose(four, one, rtol=1e-3)
    kernel, adapter = state.params.blocks.attention.query.kernel, state.params.head_adapter.a
    assert kernel[...].sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2
    assert adapter[...].sharding.is_fully_replicated
    print("the same")
"""


@pytest.mark.slow
def test_four_devices_train_as_one(tmp_path: Path):
    random = np.random.default_rng(0)
    words = np.array(["ant", "bee", "cat"])

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(words, random.integers(low, high)))

    rows = [{"prompt": text(2, 5), "completion": text(3, 12)} for _ in range(80)]
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert on_devices.run(4, SCRIPT, arguments=(data, tmp_path / "runs")) == "the same"


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params.blocks.attention.query.kernel", (30, 576, 96), P(None, "fsdp")),
        ("opt_state.1.mu.blocks.mlp.down.kernel.value", (30, 96, 576), P(None, None, "fsdp")),
        ("mlp.down.kernel", (96, 576), P(None, "fsdp")),
        ("mlp.down.kernel", (96, 578), P("fsdp")),  # hidden is not divided: the other axis
        ("mlp.down.kernel", (98, 578), P()),
        ("embedding.embedding", (49152, 576), P(None, "fsdp")),
        ("blocks.attention.query.bias", (30, 576), P()),
        ("blocks.mlp_norm.scale", (30, 576), P()),
        ("blocks.attention.query.adapter.a", (30, 576, 8), P()),
        ("opt_state.1.count.mlp.down.kernel", (), P()),  # a number for each weight
        ("step", (), P()),
    ],
)
def test_a_weight_is_split_by_its_path(path, shape, expected):
    assert mesh.spec(path, shape, {"data": 2, "fsdp": 4}) == expected


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_every_matrix_has_its_axes(name):
    for path, shape in shapes(PRESETS[name]).items():
        split = "fsdp" in mesh.spec(".".join(path), shape, {"fsdp": 2})
        assert split != (path[-1] in ("scale", "bias")), path


def test_more_devices_than_there_are():
    there = jax.local_device_count()
    mesh.check(MeshShape(data=there))
    with pytest.raises(ValueError, match=f"--mesh data=1,fsdp={there + 1} has {there + 1} devices"):
        mesh.check(MeshShape(fsdp=there + 1))


def test_one_device_is_left_to_jax():
    batch = {"tokens": np.zeros((2, 4, 8), np.int32)}
    assert mesh.make(MeshShape()) is None
    assert mesh.of(jax.numpy.zeros(3)) is None
    assert mesh.rows(batch, None, axis=1) is batch
