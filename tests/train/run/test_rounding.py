"""bfloat16 by chance: right on average, the same for the same key, and enough to train with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.models.config import ModelConfig
from train.models.decoder import Decoder
from train.run import step as train_step
from train.run.checkpoint import Checkpointer
from train.run.optimizer import adamw
from train.run.options import LossOptions, StepOptions
from train.run.rounding import narrowed, rounded, widened

KEY = jax.random.key(3)


@pytest.mark.parametrize("x", [1.001, -0.3, 3e-30, 255.9])
def test_each_number_becomes_one_of_its_neighbours_and_itself_on_average(x):
    x = np.float32(x)
    found = np.asarray(rounded(jnp.full((300, 300), x), KEY), np.float32)
    below, above = np.unique(found)
    assert below < x < above
    assert above - below <= abs(x) / 128  # neighbours
    share = (x - below) / (above - below)
    deviation = np.sqrt(share * (1 - share) / found.size)
    assert np.mean(found == above) == pytest.approx(share, abs=float(4 * deviation))


def test_what_bfloat16_holds_stays_and_infinities_and_nan_are_not_mixed_up():
    x = jnp.array([0.0, -1.5, 2.0**-126, jnp.inf, -jnp.inf, jnp.nan])
    for seed in range(20):
        np.testing.assert_array_equal(rounded(x, jax.random.key(seed)).astype(jnp.float32), x)


def test_noise_is_of_the_key_and_of_each_element():
    x = jnp.full((64, 128), 1.003)
    one, again, other = (rounded(x, key) == 1 for key in (KEY, KEY, jax.random.key(4)))
    np.testing.assert_array_equal(one, again)
    assert 0.3 < np.mean(one != other) < 0.6
    for rows in (one, one.T):  # no two rows alike
        assert len(np.unique(rows, axis=0)) == len(rows)
    left, right = narrowed([x, x], [jnp.bfloat16(0), jnp.bfloat16(0)], KEY)
    assert np.mean(left != right) > 0.3


def test_only_what_was_bfloat16_is_rounded():
    before = {"count": jnp.int32(3), "matrix": jnp.ones(4, jnp.bfloat16), "scale": jnp.ones(2)}
    wide = widened(before)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(wide)] == ["int32", "float32", "float32"]
    after = narrowed(wide, before, KEY)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [
        leaf.dtype for leaf in jax.tree.leaves(before)
    ]


SHAPE = ModelConfig(
    vocab_size=64, hidden_size=32, layers=2, heads=2, kv_heads=1, head_size=16, mlp_size=64
)


def batches(count: int):
    """Text in which each token has two likely successors."""
    random = np.random.default_rng(0)
    successors = random.integers(0, SHAPE.vocab_size, (SHAPE.vocab_size, 2))
    for _ in range(count):
        tokens = random.integers(0, SHAPE.vocab_size, (8, 33))
        for t in range(32):
            tokens[:, t + 1] = successors[tokens[:, t], random.integers(0, 2, 8)]
        tokens = tokens.astype(np.int32)
        where = np.ones((8, 32), np.int32), np.tile(np.arange(32, dtype=np.int32), (8, 1))
        yield {
            **{"tokens": tokens[:, :-1], "labels": tokens[:, 1:]},
            **{"segments": where[0], "positions": where[1]},
        }


@pytest.mark.slow
def test_weights_in_bfloat16_learn_what_float32_learns(monkeypatch, tmp_path, quickly_compiled):
    optimizer = adamw(beta1=0.9, beta2=0.999, weight_decay=0.1, clip_norm=1.0)
    data = [*batches(60)] * 2

    def state(weights: str, params: nnx.State | None = None) -> train_step.TrainState:
        model = Decoder(dataclasses.replace(SHAPE, weights=weights), rngs=nnx.Rngs(params=0))
        if params is not None:
            like = nnx.state(model)
            nnx.update(model, jax.tree.map(lambda x, y: x.astype(y.dtype), params, like))
        return train_step.TrainState.create(model, optimizer, KEY)

    def step():
        return jax.jit(lambda *a: train_step._step(*a, LossOptions(), StepOptions()))

    def learn(take, state, rate, count=120):
        """The loss at the beginning and at the end, and what is learnt then."""
        losses = []
        for batch in data[:count]:
            state, metrics = take(state, batch, rate)
            losses.append(float(metrics.loss))
        return np.mean(losses[:10]), np.mean(losses[-10:]), state

    take, take_narrow = step(), step()
    *_, warm = learn(take, state("float32"), 1e-2, count=60)
    before, expected, _ = learn(take, state("float32", warm.params), 3e-5)
    assert expected < before - 0.03
    _, found, end = learn(take_narrow, state("bfloat16", warm.params), 3e-5)
    assert found == pytest.approx(expected, abs=2e-3)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((end.params, end.opt_state))}
    assert dtypes == {"bfloat16", "float32", "int32"}

    # What is saved is what goes on, to the bit.
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(120, end, {})
        again = checkpointer.state(120, like=jax.eval_shape(lambda: end))
    after = [take_narrow(begin, data[0], 3e-5)[0].params for begin in (end, again)]
    for one, other in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_array_equal(one, other)

    def nearest(tree, like, _key):
        return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)

    monkeypatch.setattr(train_step, "narrowed", nearest)
    _, lost, _ = learn(step(), state("bfloat16", warm.params), 3e-5)
    assert lost > expected + 1e-2
