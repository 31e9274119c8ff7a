"""The chunked backend beyond the contract: its memory, its tiles, and what it leaves undone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Candidate, assert_no_worse, assert_stats, case, ours, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lsce
from lsce.backends import chunked
from lsce.backends.chunked import Tile
from lsce.problem import Problem

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CHUNKED = Candidate("chunked")
FLOAT = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def loss(hidden, head, labels, **options):
    return lsce.linear_cross_entropy(hidden, head, labels, implementation="chunked", **options)


def temporary_bytes(dtype: str, implementation: str, **options) -> int:
    """Scratch memory of the compiled loss and gradients at N, D, V = 4096, 256, 50257."""
    head = (50257, 256) if options.get("head_layout") != "dv" else (256, 50257)
    shapes = [jax.ShapeDtypeStruct(shape, FLOAT[dtype]) for shape in ((4096, 256), head)]
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def value(hidden, head, labels):
        return lsce.linear_cross_entropy(
            hidden, head, labels, implementation=implementation, **options
        )

    step = jax.value_and_grad(value, argnums=(0, 1), has_aux=options.get("return_stats", False))
    analysis = jax.jit(step).lower(*shapes, labels).compile().memory_analysis()
    return analysis.temp_size_in_bytes


LOGITS = 4096 * 50257 * 4


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"label_smoothing": 0.1}),
        ("bfloat16", {"label_smoothing": 0.1}),
        ("bfloat16", {"head_layout": "dv", "softcap": 30.0, "return_stats": True}),
    ],
)
def test_memory_stays_under_an_eighth_of_the_logits(dtype, options):
    assert temporary_bytes(dtype, "chunked", **options) < LOGITS / 8


def test_the_reference_would_fail_the_memory_test():
    assert temporary_bytes("float32", "reference", label_smoothing=0.1) > LOGITS


@pytest.mark.parametrize("tile", [Tile(50, 100), Tile(128, 86), Tile(40, 512)], ids=str)
def test_ragged_tiles(monkeypatch, tile):
    monkeypatch.setattr(chunked, "tile_size", lambda problem: tile)
    this = case((127, 24, 257), label_smoothing=0.1, z_loss=1e-2, bias=True, weights=True)
    got = ours(CHUNKED, this.inputs, **this.options)
    assert_no_worse(got, this)
    assert_stats(got, this)


@pytest.mark.parametrize(
    ("platform", "n", "v"),
    list(itertools.product(["cpu", "gpu"], [0, 1, 127, 8192, 2**20], [1, 50257, 262144])),
)
def test_tile_size(platform, n, v):
    f32 = np.dtype(np.float32)
    tile = chunked.tile_size(Problem(n, 8, v, f32, f32, platform, "any chip"))
    assert 0 <= tile.n <= n
    assert 1 <= tile.v <= v
    assert tile.n * tile.v <= 2**25 * 1.25
    if n and tile.v < v:
        assert tile.v % 128 == 0
        strips = -(-v // tile.v)
        assert strips * tile.v - v < strips * 128  # no more uneven than that needs


def test_a_frozen_input_costs_no_matmul():
    """Forward and recomputed logits are two products; each gradient is one more."""
    this = case((16, 8, 32)).inputs
    arrays = jnp.asarray(this.hidden), jnp.asarray(this.head)

    def products(argnums) -> int:
        step = jax.jit(jax.grad(lambda h, c: loss(h, c, this.labels), argnums=argnums))
        return step.lower(*arrays).as_text().count("stablehlo.dot_general")

    assert products((0, 1)) == 4
    assert products(0) == 3
    assert products(1) == 3


def test_forward_mode_is_refused():
    this = case((16, 8, 32)).inputs
    hidden = jnp.asarray(this.hidden)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda h: loss(h, this.head, this.labels), (hidden,), (hidden,))


def test_gradients_of_logits_in_the_thousands():
    """exp(z − lse) would carry the rounding of the lse, 2e-4 here."""
    head = jnp.array([[4099.0], [4096.0]])
    got = jax.grad(lambda c: loss(jnp.ones((1, 1)), c, jnp.array([0])))(head)[:, 0]
    p = 1 / (1 + np.exp(3.0))
    np.testing.assert_allclose(got, [-p, p], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_second_derivatives(softcap, monkeypatch):
    """Those of the reference are slopes of the true gradient; the chunked ones agree with them."""
    monkeypatch.setattr(chunked, "tile_size", lambda problem: Tile(8, 20))
    this = case((16, 8, 32), label_smoothing=0.1, z_loss=0.1, softcap=softcap)
    arrays, direction = this.inputs, np.random.default_rng(2).standard_normal((16, 8))
    step = 1e-6
    ahead, behind = (
        truth(arrays._replace(hidden=arrays.hidden + s * direction), **this.options).grads["hidden"]
        for s in (step, -step)
    )
    expected = (ahead - behind) / (2 * step)

    def gradient(implementation):
        def value(hidden):
            return lsce.linear_cross_entropy(
                hidden, arrays.head, arrays.labels, implementation=implementation, **this.options
            )

        return jax.grad(value)

    hidden, direction = jnp.asarray(arrays.hidden), jnp.asarray(direction, jnp.float32)
    _, forward = jax.jvp(gradient("reference"), (hidden,), (direction,))
    np.testing.assert_allclose(forward, expected, rtol=1e-3, atol=1e-5)
    backward = jax.grad(lambda h: jnp.vdot(gradient("chunked")(h), direction))(hidden)
    np.testing.assert_allclose(backward, expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected).max() > 1e-2


@pytest.mark.slow
def test_second_derivatives_in_a_weight_of_zero(monkeypatch):
    """How the gradients change as a removed token comes back, as influence functions ask."""
    monkeypatch.setattr(chunked, "tile_size", lambda problem: Tile(8, 20))
    this = case((16, 8, 32), label_smoothing=0.1, z_loss=0.1).inputs
    hidden, head = jnp.asarray(this.hidden), jnp.asarray(this.head)
    direction = np.random.default_rng(2).standard_normal(head.shape).astype(np.float32)
    weights = jnp.asarray(np.arange(16) % 2, jnp.float32)

    def change(implementation):
        def along(weights):
            d_head = jax.grad(lambda c: total(c, weights))(head)
            return jnp.vdot(d_head, direction)

        def total(head, weights):
            return lsce.linear_cross_entropy(
                hidden,
                head,
                this.labels,
                weights=weights,
                label_smoothing=0.1,
                z_loss=0.1,
                reduction="sum",
                implementation=implementation,
            )

        return np.asarray(jax.grad(along)(weights))

    got, expected = change("chunked"), change("reference")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    back = (weights == 0) & (this.labels >= 0)
    assert np.abs(expected[back]).min() > 1e-3
    assert not expected[this.labels < 0].any()


N, D, V = 6, 4, 11


@jax.jit
def compiled(hidden, head, labels, weights):
    """Loss and gradients in both directions of tiles of 4 × 3, with statistics."""

    def value(hidden, head):
        return loss(hidden, head, labels, weights=weights, label_smoothing=0.1, return_stats=True)

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(hidden, head)


@given(
    hidden=hnp.arrays(np.float32, (N, D), elements=st.floats(-50, 50, width=32)),
    head=hnp.arrays(np.float32, (V, D), elements=st.floats(-50, 50, width=32)),
    labels=hnp.arrays(np.int32, N, elements=st.integers(0, V - 1) | st.just(-100)),
    weights=hnp.arrays(np.float32, N, elements=st.just(0.0) | st.floats(0.125, 4, width=32)),
)
@settings(max_examples=60)
def test_any_values(hidden, head, labels, weights):
    """Logits up to ±10⁴: nothing overflows, and every statistic stays in its range."""
    this = case((N, D, V)).inputs._replace(hidden=hidden, head=head, labels=labels, weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "tile_size", lambda problem: Tile(4, 3))
        (value, stats), grads = compiled(hidden, head, labels, weights)
    live = labels >= 0
    if not (weights * live).any():
        assert value == 0.0
        assert not any(np.any(grad) for grad in grads)
        return
    expected = truth(this, label_smoothing=0.1)
    # The loss is a difference of numbers as large as the logits, each rounded to float32.
    rounding = 1e-5 + 4 * np.finfo(np.float32).eps * np.abs(hidden @ head.T).max()
    np.testing.assert_allclose(value, expected.value, rtol=1e-5, atol=rounding)
    # Logits have an error in proportion to their size, and it passes through p to the gradients.
    noise = 1e-6 * np.abs(hidden @ head.T).max()
    for name, grad, other in zip(("hidden", "head"), grads, (head, hidden), strict=True):
        true = expected.grads[name]
        error, size = np.linalg.norm(grad - true), np.linalg.norm(true)
        assert error <= 1e-4 * size + noise * np.linalg.norm(other) + 1e-5
    some = jax.tree.map(lambda x: np.asarray(x)[live], stats)
    assert (some.target_logit <= some.lse).all()
    assert (some.loss >= -rounding).all()
    assert ((some.confidence > 0) & (some.confidence <= 1)).all()
    assert ((some.entropy >= -1e-5) & (some.entropy <= np.log(V) + 1e-5)).all()
    assert (some.sum_p_squared <= some.confidence + 1e-6).all()
    assert (some.sum_p_squared >= some.confidence**2 - 1e-6).all()
    assert (some.correct == (some.prediction == labels[live])).all()
