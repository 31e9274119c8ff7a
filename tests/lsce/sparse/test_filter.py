"""The default filter, and what stands in for dropped mass."""

import jax.numpy as jnp
import numpy as np
import pytest
from contract import case
from hopper_on_cpu import problem
from scipy.special import logsumexp, softmax

from lsce.backends.hopper.tiles import BackwardTiles
from lsce.sparse import filter as filtering

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def epsilon(gradient_filter: float | str, live: int, v: int) -> float:
    return float(jnp.exp(filtering.log_epsilon(gradient_filter, jnp.int32(live), v)))


def test_the_default_filter_follows_tokens_and_classes():
    assert epsilon("auto", 8192, 256_000) == pytest.approx(2.0**-14.2, rel=1e-5)
    assert epsilon("auto", 2048, 256_000) == pytest.approx(2.0**-15.2, rel=1e-5)
    assert epsilon("auto", 8192, 128_000) == pytest.approx(2.0**-13.575, rel=1e-5)
    assert epsilon("auto", 8192, 32_000) == pytest.approx(2.0**-10.325, rel=1e-5)
    assert epsilon("auto", 0, 10**6) == pytest.approx(2.0**-17, rel=1e-5)
    assert epsilon("auto", 10**6, 1000) == pytest.approx(2.0**-7, rel=1e-5)
    assert epsilon(2.0**-9, 1, 7) == pytest.approx(2.0**-9)


@pytest.mark.parametrize(("name", "halvings"), [("fp8", 11.2), ("hidden", 10.2)])
def test_others_have_a_filter_of_their_own(name, halvings, monkeypatch):
    """Whatever that of the default is."""
    monkeypatch.setattr(filtering, "EPSILON", 2.0**-20)
    assert epsilon("auto", 8192, 256_000) == pytest.approx(2.0**-20, rel=1e-5)
    assert epsilon(name, 8192, 256_000) == pytest.approx(2.0**-halvings, rel=1e-5)
    assert epsilon(name, 8192, 16_000) == pytest.approx(2.0 ** (2.5 - halvings), rel=1e-5)
    assert epsilon(name, 0, 10**6) == pytest.approx(2.0**-13, rel=1e-5)
    assert epsilon(name, 10**6, 1000) == pytest.approx(2.0**-7, rel=1e-5)


@pytest.mark.parametrize("v", [1000, 32_000, 256_000, 10**6])
@pytest.mark.parametrize("n", [1, 2048, 8192, 32_768, 10**6])
def test_the_default_stays_below_that_of_fp8(n, v):
    """Flat tokens have the one or the other, and the higher one bounds what is in 8 bits."""
    assert epsilon("auto", n, v) <= epsilon("fp8", n, v)
    more = [filtering.more_marked(name, n, v) for name in ("hidden", "fp8", "auto")]
    assert more[0] == 1.0
    assert more[0] <= more[1] <= more[2] <= (4 / 3) ** 4 + 1e-9


def test_a_smaller_number_marks_more():
    more, fitted = filtering.more_marked, 2.0**-10.2
    assert more("auto", 8192, 256_000) == pytest.approx(more(2.0**-14.2, 8192, 256_000))
    assert more("fp8", 8192, 256_000) == pytest.approx(4 / 3)
    assert more("auto", 8192, 32_000) == pytest.approx((4 / 3) ** 2)
    assert more(fitted, 8192, 256_000) == pytest.approx(1.0)
    assert more(fitted / 16, 8192, 256_000) == pytest.approx((4 / 3) ** 4)
    assert more(fitted / 16, 2048, 256_000) == pytest.approx((4 / 3) ** 3)
    assert more(0.5, 8192, 256_000) == 1.0
    assert more(1e-320, 8192, 256_000) < 1e9
    tiles = BackwardTiles()
    usual, default, many = (
        tiles.static_chunks(1000, 64, 64 * 28, more=x)
        for x in (1.0, more("auto", 8192, 256_000), more(2e-5, 8192, 256_000))
    )
    assert usual < default < many <= tiles.most_chunks(1000, 64, 64 * 28)


def pull(p: np.ndarray, slope: np.ndarray, head: np.ndarray, epsilon: float):
    """Each token's dropped mass, and how it acts on the hidden state."""
    lost = np.where((p > epsilon).any(0), 0.0, p)
    return lost.sum(1), (lost * slope) @ head


@pytest.mark.parametrize("cap", [15.0, 20.0, 30.0])
def test_the_slope_of_dropped_mass(cap):
    given = case((20, 64, 2048), "bfloat16", spread=5.0).inputs
    hidden, head = (x.astype(np.float64) for x in (given.hidden, given.head))
    z = cap * np.tanh(hidden @ head.T / cap)
    dropped, true = pull(softmax(z, 1), 1 - (z / cap) ** 2, head, 2.0**-7)
    p = problem(n=20, d=64, v=2048, softcap=cap)
    lse = jnp.asarray(logsumexp(z, 1), jnp.float32)
    slope = np.asarray(filtering.dropped_slope(p, lse, np.log(2.0**-7)))
    assert ((slope >= 0) & (slope <= 1)).all()

    def error(slope) -> float:
        return np.linalg.norm(true - (dropped * slope)[:, None] * head.mean(0))

    assert error(slope) < 0.7 * error(1.0)
    assert filtering.dropped_slope(problem(), lse, -7.0) == 1.0


@pytest.mark.parametrize("cap", [None, 20.0])
def test_only_classes_that_can_have_mass_stand_in(cap):
    """Half of them are masked, one is never dropped, and the rows of both are long."""
    head = np.random.default_rng(0).standard_normal((2048, 64)) + 1.0
    masked = np.arange(2048) % 2 == 1
    bias = np.where(masked, np.resize([-1e30, -1e9, -60.0], 2048), 1.0)
    head[masked], head[0], bias[0] = 5.0, -300.0, 60.0
    row = filtering.stand_in(
        problem(n=20, d=64, v=2048, softcap=cap),
        jnp.asarray(np.pad(head, ((0, 8), (0, 0)), constant_values=99), jnp.bfloat16),
        jnp.asarray(bias, jnp.float32),
        jnp.zeros(64, jnp.float32),
        jnp.float32(1.0),
    )
    head[0] *= cap is None  # whose slope is 0
    expected = head[~masked].mean(0)
    assert np.linalg.norm(np.asarray(row) - expected) < 0.01 * np.linalg.norm(expected)


def test_a_heads_shift_and_the_biases_shift_no_stand_in():
    """Only differences of logits say what has mass."""
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.standard_normal((2048, 64)), jnp.bfloat16)
    bias, hidden = jnp.asarray(rng.standard_normal(2048), jnp.float32), jnp.ones(64)
    p = problem(n=20, d=64, v=2048)
    row = filtering.stand_in(p, head, bias, hidden, jnp.float32(3.0))
    shifted = filtering.stand_in(p, head, bias - 40.0, hidden, jnp.float32(-37.0))
    assert 0.1 < np.linalg.norm(row) < 10
    np.testing.assert_allclose(shifted, row, atol=0.01)


def test_without_any_slope_nothing_pulls():
    p = problem(n=20, d=64, v=2048, softcap=1.0)
    head, bias = jnp.ones((2048, 64), jnp.bfloat16), jnp.full(2048, 1e9, jnp.float32)
    row = filtering.stand_in(p, head, bias, jnp.ones(64), jnp.float32(0.0))
    np.testing.assert_array_equal(row, 0.0)


@pytest.mark.parametrize(
    ("shape", "pays"),
    [
        ((8192, 2304, 256_000), True),
        ((2048, 4096, 128_256), True),
        ((2048, 2048, 128_256), False),  # as long as what 8 bits begin and end with
        ((32_768, 4096, 32_000), False),  # nearly every class is some token's
        ((32_768, 576, 49_152), False),
    ],
)
def test_a_forward_in_8_bits_pays_where_it_was_measured_to(shape, pays):
    """benchmarks/results/h200-everywhere-precision.json"""
    n, d, v = shape
    assert filtering.low_forward_worthwhile(problem(n=n, d=d, v=v)) is pays
