"""Sums over parts of the classes make those over all, however the parts are put together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsce.problem import Problem
from lsce.sums import LogitSums

F32 = np.dtype(np.float32)

N, PARTS, W = 7, 4, 5


def logits() -> np.ndarray:
    """With equal maxima in different parts, a part without a class, and large numbers."""
    z = np.random.default_rng(0).standard_normal((N, PARTS, W)).astype(np.float32)
    z[0, 1, 3] = z[0, 2, 0] = 9.0
    z[1, 2] = -np.inf
    z[2] += 3000.0
    z[3, 0, 4] = 80.0
    return z


LABELS = np.array([8, 0, 19, 4, 7, 12, -1], np.int32)


def parts() -> list[LogitSums]:
    z = jnp.asarray(logits())
    return [LogitSums.of(z[:, i], jnp.asarray(LABELS), i * W) for i in range(PARTS)]


def folded() -> LogitSums:
    return functools.reduce(LogitSums.combine, parts(), LogitSums.empty(N))


def backwards() -> LogitSums:
    return functools.reduce(LogitSums.combine, reversed(parts()))


def over_an_axis() -> LogitSums:
    return jax.tree.map(lambda *x: jnp.stack(x), *parts()).over(0)


def over_a_mesh() -> LogitSums:
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts())
    everywhere = jax.vmap(lambda part: part.over("shards"), axis_name="shards")(stacked)
    return jax.tree.map(lambda x: x[2], everywhere)


@pytest.mark.parametrize("make", [folded, backwards, over_an_axis, over_a_mesh])
def test_parts_make_the_whole(make):
    z = logits().reshape(N, -1).astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    whole, got = p.sum(1), make()
    p /= whole[:, None]
    log_p = np.log(np.where(p > 0, p, 1.0))
    np.testing.assert_array_equal(got.argmax, z.argmax(1))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    near(got.lse, np.log(whole) + z.max(1))
    near(got.entropy, -(p * log_p).sum(1))
    near(got.sum_p_squared, (p**2).sum(1))
    near(got.plain, z.sum(1))
    near(got.target, np.where(LABELS >= 0, z[np.arange(N), LABELS], 0.0))


def test_what_nobody_made_stays_away():
    whole = over_an_axis()
    few = [
        x._replace(target=None, argmax=None, exp_squared=None, kept=0.5 * x.exp) for x in parts()
    ]
    got = functools.reduce(LogitSums.combine, few)
    assert (got.target, got.argmax, got.exp_squared, got.squares) == (None,) * 4
    np.testing.assert_allclose(got.kept, 0.5 * whole.exp, rtol=1e-6)
    np.testing.assert_allclose(got.shifted_exp, whole.shifted_exp, rtol=1e-5, atol=1e-5)


def test_a_rounded_largest_term_makes_no_impossible_statistic():
    """A GPU's exp2 made 1.000001 of sure tokens, which a calibration error refuses."""
    sure = np.float32(1 - 1e-6)
    rounded = over_an_axis()._replace(
        exp=jnp.full(N, sure), exp_squared=jnp.full(N, 1.0), shifted_exp=jnp.zeros(N)
    )
    _, stats = rounded.finish(
        Problem(N, 1, PARTS * W, F32, F32, platform="cpu", chip="", return_stats=True),
        jnp.asarray(LABELS),
    )
    live = LABELS >= 0
    np.testing.assert_array_equal(stats.confidence, np.where(live, 1.0, 0.0))
    np.testing.assert_array_equal(stats.sum_p_squared, np.where(live, 1.0, 0.0))
    np.testing.assert_array_equal(stats.entropy, 0.0)
