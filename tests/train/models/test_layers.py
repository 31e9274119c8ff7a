"""The embedding's gradient: sums by token that are right, and the same, however tokens repeat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.models.config import PRESETS
from train.models.layers import SORTED_BLOCK, embed, gelu, linear, side_by_side, sum_by_token

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SIZE = 700


def drawn(kind: str, n: int) -> np.ndarray:
    """Tokens below SIZE: as in text, all the same, all different, or in runs as long as blocks."""
    random = np.random.default_rng(n)
    tokens = {
        "zipf": np.minimum(random.zipf(1.2, n), SIZE) - 1,
        "one": np.full(n, SIZE - 1),
        "different": random.permutation(SIZE)[np.arange(n) % SIZE],
        "runs": np.arange(n) // SORTED_BLOCK + (np.arange(n) % 3 == 0),
        "ends": np.where(random.random(n) < 0.5, 0, SIZE - 1),
    }[kind]
    return random.permutation(tokens).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "n", "d"),
    [
        ("zipf", 1024, 16),
        ("zipf", 1, 3),
        ("one", 5 * SORTED_BLOCK, 8),
        ("one", 5 * SORTED_BLOCK + 1, 8),
        ("different", SIZE, 5),
        ("runs", 7 * SORTED_BLOCK - 2, 24),
        ("ends", 999, 7),
    ],
)
def test_sums_by_token_are_those_of_float64(kind, n, d, dtype):
    tokens = drawn(kind, n)
    rows = jnp.asarray(np.random.default_rng(1).normal(1.0, 1.0, (n, d)), dtype)
    expected = np.zeros((SIZE, d))
    np.add.at(expected, tokens, np.asarray(rows, np.float64))
    found = jax.jit(sum_by_token, static_argnums=2)(rows, tokens, SIZE)
    assert found.dtype == rows.dtype
    assert np.abs(expected).max() > 1
    precision = 2.0**-8 if dtype == "bfloat16" else 1e-5  # one rounding of the sum
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=1.01 * precision, atol=1e-4
    )
    np.testing.assert_array_equal(found[np.setdiff1d(np.arange(SIZE), tokens)], 0)


def test_an_embedding_and_its_gradient_are_those_of_indexing():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (3, 70), dtype=np.int32)
    table = jnp.asarray(random.normal(size=(50, 12)), jnp.float32)
    np.testing.assert_array_equal(embed(table, tokens), table[tokens])

    def gradient(lookup):
        return jax.jit(jax.grad(lambda table: jnp.sum(jnp.sin(lookup(table, tokens) * 3))))(table)

    expected = gradient(lambda table, tokens: table[tokens])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(gradient(embed), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_embedding_costs_no_sort():
    table, scale = jnp.ones((50, 12)), jnp.ones(12)
    tokens = jnp.zeros((2, 64), jnp.int32)

    def loss(table, scale):
        return jnp.sum(embed(table, tokens) @ scale)

    frozen, trained = (
        str(jax.make_jaxpr(jax.grad(loss, argnums))(table, scale)) for argnums in (1, (0, 1))
    )
    assert "sort[" not in frozen
    assert "sort[" in trained


def test_a_token_without_a_row_is_nan_and_no_row_has_its_gradient():
    table = jnp.ones((4, 2))
    tokens = jnp.array([1, 4, 1])
    assert np.isnan(embed(table, tokens)).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    gradient = jax.grad(lambda table: jnp.sum(embed(table, tokens)))(table)
    np.testing.assert_array_equal(gradient, [[0, 0], [2, 2], [0, 0], [0, 0]])


@pytest.mark.parametrize(("tokens", "products"), [(7, 6), (64, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_matrices_side_by_side_are_one_product_of_many_tokens(tokens, products, bias):
    """And one product for the gradient of each factor, where there were two of them."""
    config, rngs = PRESETS["nano"], nnx.Rngs(0)
    graph, state = nnx.split([linear(config, 16, size, rngs, bias=bias) for size in (8, 24)])
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda w: jnp.asarray(random.normal(size=w.shape), w.dtype), state)
    x = jnp.asarray(random.normal(size=(1, tokens, 16)), jnp.float32)

    def together(state, x):
        return side_by_side(x, *nnx.merge(graph, state))

    def apart(state, x):
        return jnp.concatenate([matrix(x) for matrix in nnx.merge(graph, state)], axis=-1)

    def gradients(function, *given):
        return jax.grad(lambda *given: jnp.sum(jnp.sin(function(*given))), (0, 1))(*given)

    np.testing.assert_allclose(together(state, x), apart(state, x), rtol=1e-5, atol=1e-5)
    for found, expected in zip(
        *(jax.tree.leaves(gradients(f, state, x)) for f in (together, apart)), strict=True
    ):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    made = str(jax.make_jaxpr(lambda *given: gradients(together, *given))(state, x))
    assert made.count("dot_general[") == products


def test_gelu_is_tanhs_and_keeps_none():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 3, 1000), jnp.float32)
    for found, expected in (
        (gelu(x), jax.nn.gelu(x)),
        (jax.vmap(jax.grad(gelu))(x), jax.vmap(jax.grad(jax.nn.gelu))(x)),
    ):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    assert "tanh" not in str(jax.make_jaxpr(jax.vmap(jax.grad(gelu)))(x))
    far = jnp.array([-1e9, 0.0, 1e9], jnp.float32)
    np.testing.assert_array_equal(gelu(far), np.maximum(far, 0))
