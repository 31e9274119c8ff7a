"""The tail in 8 bits, emulated, against the formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hopper_on_cpu import problem
from scipy.special import logsumexp

from lsce.sparse import tail
from lsce.sparse.coefficients import coefficients

N, LIVE, D, V = 64, 60, 32, 300

OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.3, "z_loss": 0.01},
    "capped": {"softcap": 8.0, "label_smoothing": 0.2},
    "biased": {"has_bias": True},
}


def inputs() -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Hidden channels of sizes from 1/100 to 100 that the head makes even, tokens of other weights,
    and a mean in both that is not small."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(-4.6, 4.6, D))
    hidden = (rng.standard_normal((N, D)) + rng.standard_normal(D)) * size
    hidden[LIVE:] = 0.0
    head = (rng.standard_normal((V, D)) + rng.standard_normal(D)) / size * 0.4
    return rng, hidden.astype(np.float32), head.astype(np.float32)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_nearly_what_was_left_out(name):
    p = problem(n=N, d=D, v=V, **OPTIONS[name])
    rng, hidden, head = inputs()
    bias = (rng.standard_normal(V) if p.has_bias else np.zeros(V)).astype(np.float32)
    u = hidden.astype(np.float64) @ head.astype(np.float64).T * p.logit_scale + bias
    z = u if p.softcap is None else p.softcap * np.tanh(u / p.softcap)
    slope = np.ones_like(z) if p.softcap is None else 1 - (z / p.softcap) ** 2
    lse = logsumexp(z, axis=1)
    g = np.where(np.arange(N) < LIVE, np.exp(rng.uniform(-3, 0, N)) * rng.choice([-1, 1], N), 0)
    c = coefficients(
        p,
        jnp.asarray(g, jnp.float32),
        jnp.float32(0.0),
        row_of_token=jnp.arange(N),
        live=jnp.int32(LIVE),
        lse=jnp.asarray(lse, jnp.float32),
        mean_square_logit=jnp.asarray((z**2).mean(1), jnp.float32),
    )
    probability = np.exp(z - lse[:, None])
    epsilon = 0.02
    left_out = (probability < epsilon) & (rng.random((N, V)) < 0.7)
    terms = np.asarray(c.a, np.float64)[:, None] * probability * slope
    if p.softcap is not None:
        terms -= np.asarray(c.s)[:, None] * (slope - np.asarray(c.kappa)[:, None])
    terms = np.where(left_out, terms, 0)
    s = tail.scales(jnp.asarray(hidden), jnp.int32(LIVE), jnp.asarray(head), V)
    got = tail.emulated(
        p, s, c, float(np.log(epsilon)), *map(jnp.asarray, (hidden, head, bias, left_out))
    )
    center = head.mean(0, dtype=np.float64)
    expected = {
        "hidden": terms @ (head - center),
        "head": terms.T @ hidden.astype(np.float64),
        "mass": terms.sum(1),
    }
    assert np.isfinite(got.hidden).all()
    assert not got.hidden[LIVE:].any()
    for field, true in expected.items():
        error = np.linalg.norm(getattr(got, field) - true) / np.linalg.norm(true)
        assert 0 < error < 0.12, field


def test_a_channel_that_never_changes_adds_nothing_to_a_logit():
    """But to dE what the head has there."""
    _, hidden, head = inputs()
    hidden[:LIVE, 3], head[:, 5] = 8.0, -2.0
    s = tail.scales(jnp.asarray(hidden), jnp.int32(LIVE), jnp.asarray(head), V)
    alone = np.isin(np.arange(D), (3, 5))
    assert s.head[5] == 0
    np.testing.assert_allclose((s.hidden * s.head * s.unit)[~alone], 1.0, rtol=1e-5)
    e8 = tail.quantised(jnp.asarray(hidden[:LIVE]), s.hidden_mean, s.hidden)
    c8 = tail.quantised(jnp.asarray(head), s.head_mean, s.head)
    assert not np.asarray(e8.astype(jnp.float32) * c8[:LIVE].astype(jnp.float32))[:, alone].any()
    head_again = np.asarray(c8.astype(jnp.float32) * (s.unit * s.hidden)[None, :])
    true = np.asarray(head - s.head_mean[None, :])
    off = np.linalg.norm(head_again - true, axis=0)[~np.isin(np.arange(D), 5)]
    assert (off < 0.04 * np.linalg.norm(true, axis=0)[~np.isin(np.arange(D), 5)]).all()
    largest = max(float(jnp.abs(x.astype(jnp.float32)).max()) for x in (e8, c8))
    assert largest == tail.LARGEST


def test_a_token_that_is_not_finite_changes_no_others_scales():
    _, hidden, head = inputs()
    hidden[3] = 0.0
    expected = tail.scales(jnp.asarray(hidden), jnp.int32(LIVE), jnp.asarray(head), V)
    hidden[3, ::3], hidden[LIVE + 1] = np.nan, np.inf
    got = tail.scales(jnp.asarray(hidden), jnp.int32(LIVE), jnp.asarray(head), V)
    for true, same in zip(expected, got, strict=True):
        assert np.isfinite(true).all()
        np.testing.assert_allclose(same, true)


def test_what_exceeds_the_largest_number_is_it():
    x = jnp.array([1e9, -500.0, 448.0, 1e-9, np.nan])
    got = tail.e4m3(x).astype(jnp.float32)
    np.testing.assert_array_equal(got, [448.0, -448.0, 448.0, 0.0, np.nan])
