"""The learning rate over time, and AdamW with clipping, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.models.config import PRESETS
from train.models.decoder import Decoder
from train.run.optimizer import adamw, learning_rate
from train.run.options import OptimizerOptions

EXPECTED = {
    # Updates 1 to 6 of 6, of which 2 warm up: then a fifth of the way down at each.
    "linear": [0.5, 1.0, 0.8, 0.6, 0.4, 0.2],
    "cosine": [0.5, 1.0, *(0.5 + 0.5 * np.cos(np.pi * np.array([0.2, 0.4, 0.6, 0.8])))],
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("schedule", EXPECTED)
def test_the_rate_warms_up_and_decays(schedule):
    rate = learning_rate(OptimizerOptions(learning_rate=3e-4, schedule=schedule, warmup_steps=2), 6)
    rates = np.array([rate(count) for count in range(6)])
    np.testing.assert_allclose(rates, 3e-4 * np.array(EXPECTED[schedule]), rtol=1e-6)


@pytest.mark.parametrize("schedule", EXPECTED)
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (1, 1), (0, 5), (5, 5)])
def test_every_update_of_a_short_run_has_a_rate(schedule, warmup_steps, total_steps):
    rate = learning_rate(
        OptimizerOptions(learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps),
        total_steps,
    )
    rates = np.array([rate(count) for count in range(total_steps)])
    assert (rates > 0).all()
    assert rates.max() == 1


def one_update(gradient, params, **changes):
    options = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0, "clip_norm": None} | changes
    optimizer = adamw(**options)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return jax.tree.map(lambda update: -0.1 * update, updates)


@pytest.mark.slow
def test_weight_decay_is_decoupled_and_spares_norms_and_biases():
    shape = dataclasses.replace(PRESETS["nano"], qkv_bias=True, qk_norms=True, tied_head=False)
    model = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(params=0)))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0), nnx.state(model, nnx.Param))
    updates = one_update(jax.tree.map(jnp.zeros_like, params), params, weight_decay=0.5)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        decayed = 0.0 if "norm" in name or "bias" in name else -0.1 * 0.5 * 3.0
        np.testing.assert_allclose(update, decayed, rtol=1e-6)


def test_clipping_scales_a_long_gradient_down_and_leaves_a_short_one():
    # With β1 = β2 = 0, Adam's update is −rate · g / (|g| + 1e-8): at |g| ~ 1e-8 it shows g's scale.
    params = {"w": jnp.zeros((2, 1))}
    long = {"w": jnp.array([[3.0], [4.0]])}

    def update(gradient, clip_norm):
        return one_update(gradient, params, beta1=0.0, beta2=0.0, clip_norm=clip_norm)["w"]

    clipped = 1e-8 * np.array([[0.6], [0.8]])
    np.testing.assert_allclose(update(long, 1e-8), -0.1 * clipped / (clipped + 1e-8), rtol=1e-4)
    np.testing.assert_allclose(update(long, None), [[-0.1], [-0.1]], rtol=1e-4)
    np.testing.assert_array_equal(update(long, 5.1), update(long, None))
