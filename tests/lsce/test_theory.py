"""The bounds against the logits that reach them, brute force, and what the loss sees."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax

import lsce
from lsce import theory

N, D, V = 24, 12, 67


def entropy(z):
    lp = log_softmax(np.asarray(z, np.float64), axis=-1)
    return -(np.exp(lp) * lp).sum(-1)


def relative(value, truth):
    return abs(float(value) - truth) / truth


@pytest.mark.parametrize("v", [2, 3, 50, 262144, 1_000_000])
@pytest.mark.parametrize("sigma", [0.0, 0.01, 1.0, 9.7, 14.0, 30.0])
def test_the_bounds_are_reached_by_the_minimiser(v, sigma):
    z = theory.least_entropy_logits(sigma, v)
    assert np.linalg.norm(z) == pytest.approx(sigma)
    assert abs(z.sum()) < 1e-9 * v
    truth = entropy(z)
    # γ without its root, as one may misread Eq. 37, is told apart where V is small.
    misread = entropy(z * math.sqrt((v - 1) / v))
    assert float(theory.entropy_lower_bound(sigma, v)) == pytest.approx(truth, rel=3e-5, abs=1e-15)
    assert v > 3 or sigma < 1 or relative(misread, truth) > 3e-2
    top = float(np.exp(log_softmax(z).max()))
    assert relative(theory.confidence_upper_bound(sigma, v), top) < 3e-5


def test_extreme_norms_have_their_limits():
    sigma = jnp.array([0.0, 1e4, jnp.inf])
    assert theory.entropy_lower_bound(sigma, 10**6) == pytest.approx([math.log(1e6), 0, 0])
    assert theory.confidence_upper_bound(sigma, 10**6) == pytest.approx([1e-6, 1, 1])
    tighter = theory.entropy_lower_bound(jnp.linspace(0.0, 40.0, 200), 10**6)
    assert np.all(np.diff(tighter) <= 1e-6)
    # As smoothing's reach shrinks: less for a larger vocabulary, more for longer logits.
    by_vocabulary = [float(theory.entropy_lower_bound(12.0, v)) for v in (100, 10**4, 10**6)]
    assert by_vocabulary == sorted(by_vocabulary)
    assert theory.softcap_entropy_bound(math.inf, 10**6) == 0
    assert theory.softcap_confidence_bound(math.inf, 10**6) == 1


@pytest.mark.parametrize(("v", "sigma"), [(2, 1.0), (3, 0.4), (3, 4.0), (5, 2.0), (7, 3.0)])
def test_no_search_finds_less_entropy_than_the_bound(v, sigma):
    r = np.random.default_rng(v)
    found = [
        minimize(lambda x: entropy(sigma * x / np.linalg.norm(x)), r.standard_normal(v)).fun
        for _ in range(8)
    ]
    assert min(found) == pytest.approx(float(theory.entropy_lower_bound(sigma, v)), rel=1e-4)


@given(st.integers(2, 9), st.floats(0, 30), st.integers(0, 2**32 - 1))
def test_no_logits_of_that_length_have_less(v, sigma, seed):
    r = np.random.default_rng(seed)
    z = np.r_[r.standard_normal((20, v)), r.standard_cauchy((20, v))]
    z *= sigma * r.random((40, 1)) ** 0.2 / np.linalg.norm(z, axis=1, keepdims=True)
    assert entropy(z).min() >= float(theory.entropy_lower_bound(sigma, v)) * (1 - 1e-5) - 1e-6
    assert np.exp(log_softmax(z, axis=1)).max() <= (
        float(theory.confidence_upper_bound(sigma, v)) * (1 + 1e-5)
    )


@pytest.mark.parametrize("cap", [0.01, 0.5, 3.0, 30.0, 400.0])
@pytest.mark.parametrize("v", [2, 5, 40, 256_000])
def test_a_softcap_bounds_entropy_and_confidence(v, cap):
    bound = theory.softcap_entropy_bound(cap, v)
    if v <= 40:  # every corner
        corners = np.where(np.arange(v) < np.arange(1, v)[:, None], cap, -cap)
        assert bound == pytest.approx(entropy(corners).min(), rel=1e-9, abs=1e-15)
    z = cap * np.tanh(np.random.default_rng(0).standard_cauchy((20, v)))
    assert entropy(z).min() >= bound * (1 - 1e-9) - 1e-15
    top = np.exp(log_softmax(np.where(np.arange(v) == 0, cap, -cap)).max())
    assert theory.softcap_confidence_bound(cap, v) == pytest.approx(top)


def test_a_softcap_of_five_keeps_a_large_vocabulary_unsure():
    one_on_top = entropy(np.where(np.arange(256_000) == 0, 5.0, -5.0))
    bound = theory.softcap_entropy_bound(5.0, 256_000)
    assert 5 < bound < 0.6 * one_on_top


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("centred", [False, True])
def test_the_power_method_finds_the_largest_singular_value(centred, dtype):
    r = np.random.default_rng(0)
    c = jnp.asarray(r.standard_normal((V, D)) + 3 * r.standard_normal(D), dtype)
    whole = np.asarray(c, np.float64)
    truth = np.linalg.norm(whole - whole.mean(0) * centred, 2)
    other = np.linalg.norm(whole - whole.mean(0) * (not centred), 2)
    found = theory.spectral_norm(c, centred=centred)
    assert relative(found, truth) < 1e-4 < relative(found, other)
    assert float(theory.spectral_norm(jnp.zeros((3, 2)))) == 0
    assert math.isnan(theory.spectral_norm(jnp.full((3, 2), jnp.nan)))


def states(softcap=None):
    """Hidden states, a head with a mean, its logits in float64, and what the loss saw."""
    r = np.random.default_rng(1)
    scale = np.geomspace(0.05, 6, N)[:, None]
    hidden = jnp.asarray(scale * r.standard_normal((N, D)), jnp.float32)
    head = jnp.asarray(r.standard_normal((V, D)) + r.standard_normal(D), jnp.float32)
    labels = jnp.asarray(r.integers(0, V, N))
    _, stats = lsce.linear_cross_entropy(
        hidden, head, labels, softcap=softcap, return_stats=True, reduction="none"
    )
    return hidden, head, np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T, stats


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_bounds_hold_for_what_the_loss_sees_and_grow_tighter(softcap):
    hidden, head, z, stats = states(softcap)
    spread = np.linalg.norm(z - z.mean(1, keepdims=True), axis=1)
    lengths = theory.logit_norms(hidden, head)
    np.testing.assert_allclose(lengths, spread, rtol=1e-4)
    lemma = theory.logit_norm_bound(hidden, head)
    centred = theory.logit_norm_bound(hidden, head, centred=True)
    assert np.all(np.linalg.norm(z, axis=1) <= lemma * (1 + 1e-5))
    assert np.all(spread <= centred * (1 + 1e-5))
    bounds = [theory.entropy_lower_bound(x, V) for x in (lemma, centred, lengths)]
    assert np.all(bounds[0] <= bounds[1] + 1e-6)
    assert np.all(bounds[1] <= bounds[2] + 1e-6)
    assert np.all(bounds[2] <= stats.entropy * (1 + 1e-5) + 1e-6)
    assert np.all(stats.confidence <= theory.confidence_upper_bound(lengths, V) * (1 + 1e-5))
    assert float(bounds[2][0]) > 0.9 * float(stats.entropy[0])  # no bound of 0
    if softcap:
        assert np.all(stats.entropy >= theory.softcap_entropy_bound(softcap, V))


def test_nothing_of_tokens_times_vocabulary_is_made():
    hidden, head = jnp.zeros((2048, 16)), jnp.zeros((4096, 16))
    for of in (
        jax.jit(lambda h, c: theory.logit_norm_bound(h, c, centred=True)),
        jax.jit(theory.logit_norms),
    ):
        memory = of.lower(hidden, head).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * head.nbytes < hidden.shape[0] * head.shape[0]


@jax.jit
def seen(z, labels):
    """The statistics and losses of logits z [N, V], through a head that is the identity."""
    head = jnp.eye(z.shape[1], dtype=z.dtype)
    return lsce.linear_cross_entropy(
        z, head, labels, label_smoothing=0.3, reduction="none", return_stats=True
    )


@settings(max_examples=30)
@given(st.floats(1e-3, 50), st.integers(0, 2**32 - 1))
def test_smoothing_penalises_the_distances_of_logits(scale, seed):
    """Proposition 3.3, at β = 0.3."""
    r = np.random.default_rng(seed)
    z = jnp.asarray(scale * r.standard_normal((8, 40)), jnp.float32)
    loss, stats = seen(z, jnp.zeros(8, jnp.int32))
    distance = theory.logit_distance(stats)
    divergence = theory.divergence_from_uniform(stats, 40)
    truth = np.asarray(z.max(1) - z.mean(1), np.float64)
    np.testing.assert_allclose(distance, truth, rtol=1e-4, atol=1e-4)
    uniform = -math.log(40) - log_softmax(np.asarray(z, np.float64), axis=1).mean(1)
    np.testing.assert_allclose(divergence, uniform, rtol=1e-4, atol=1e-4)
    assert np.all(divergence <= distance + 1e-4)
    assert np.all(distance <= divergence + math.log(40) + 1e-4)
    hard = np.asarray(stats.lse - stats.target_logit)
    penalty = 0.3 * (np.asarray(divergence) + math.log(40))
    np.testing.assert_allclose(loss, 0.7 * hard + penalty, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0])
def test_the_smoothed_target_is_optax_s(beta):
    q = np.asarray(optax.smooth_labels(jax.nn.one_hot(jnp.int32(3), V), beta), np.float64)
    target = theory.smoothed_target(beta, V)
    assert target.confidence == pytest.approx(q.max(), rel=1e-6)
    assert target.entropy == pytest.approx(-(q * np.log(q)).sum(), rel=1e-6)
    assert target.gap == pytest.approx(np.log(q[3] / q[0]), rel=1e-5, abs=1e-9)
    for none in (0, 5e-324):
        assert theory.smoothed_target(none, V) == (1, 0, math.inf)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: theory.entropy_lower_bound(-1.0, 9), ValueError, "sigma must be at least 0"),
        (lambda: theory.entropy_lower_bound(math.nan, 9), ValueError, "sigma must be at least 0"),
        (lambda: theory.confidence_upper_bound(1.0, 1), ValueError, "vocab_size must be at least"),
        (lambda: theory.least_entropy_logits(1.0, 2.5), TypeError, "vocab_size=2.5"),
        (lambda: theory.softcap_entropy_bound(0.0, 9), ValueError, "softcap must be more than 0"),
        (lambda: theory.smoothed_target(1.5, 9), ValueError, r"label_smoothing must lie in \[0"),
        (lambda: theory.spectral_norm(jnp.zeros(3)), ValueError, r"got \(3,\)"),
        (lambda: theory.spectral_norm(jnp.zeros((3, 2), int)), TypeError, "matrix must be a float"),
        (
            lambda: theory.logit_norms(jnp.zeros((2, 3)), jnp.zeros((5, 4))),
            ValueError,
            r"hidden has shape \(2, 3\), but head has shape \(5, 4\)",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
