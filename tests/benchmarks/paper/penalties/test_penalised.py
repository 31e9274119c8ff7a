"""The penalties are what their docstring says, in value and gradient, to float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsce
from benchmarks.paper.penalties import MODULES, confidence, maxsup
from lsce import backends

BETA = 0.3
N, D, V = 13, 8, 37


def log_softmax(z):
    return z - np.logaddexp.reduce(z, axis=1, keepdims=True)


def plain(z, y):
    log_p, rows = log_softmax(z), np.arange(len(z))
    gradient = np.exp(log_p)
    gradient[rows, y] -= 1
    return -log_p[rows, y], gradient


def with_maxsup(z, y):
    loss, gradient = plain(z, y)
    gradient[np.arange(len(z)), z.argmax(axis=1)] += BETA
    return loss + BETA * (z.max(axis=1) - z.mean(axis=1)), gradient - BETA / V


def with_confidence_penalty(z, y):
    loss, gradient = plain(z, y)
    log_p = log_softmax(z)
    entropy = -np.sum(np.exp(log_p) * log_p, axis=1)
    return loss - BETA * entropy, gradient + BETA * np.exp(log_p) * (log_p + entropy[:, None])


PENALTIES = {"maxsup": maxsup.penalty, "confidence-penalty": confidence.penalty}
SAID = {"maxsup": with_maxsup, "confidence-penalty": with_confidence_penalty}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, module in MODULES.items():
        monkeypatch.setitem(backends.MODULES, name, module)


def numbers():
    r = np.random.default_rng(0)
    hidden, head = r.standard_normal((N, D)), r.standard_normal((V, D))
    return hidden, head, np.concatenate([[0, V - 1], r.integers(0, V, N - 2)])


@pytest.mark.parametrize("name", MODULES)
def test_the_gradient_of_a_penalty_is_the_one_that_is_said(name):
    """JAX's derivative of the very function, in float64, against the formula."""
    hidden, head, y = numbers()
    z = hidden @ head.T
    penalty = PENALTIES[name]
    with jax.enable_x64(True):
        value, pull = jax.vjp(penalty, jnp.array(z))
        (gradient,) = pull(jnp.ones(N))
        assert gradient.dtype == jnp.float64
        value, gradient = np.asarray(value), np.asarray(gradient)
    loss, of_z = SAID[name](z, y)
    without, of_z_without = plain(z, y)
    np.testing.assert_allclose(BETA * value, loss - without, rtol=1e-12)
    np.testing.assert_allclose(BETA * gradient, of_z - of_z_without, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_loss_of_a_penalised_call_and_its_gradients(name):
    hidden, head, y = numbers()
    live = np.arange(N) != 4
    labels = jnp.array(np.where(live, y, -100))

    def call(hidden, head):
        return lsce.linear_cross_entropy(
            hidden,
            head,
            labels,
            label_smoothing=BETA,
            implementation=name,
            reduction="sum",
            return_stats=True,
        )

    inputs = jnp.array(hidden, jnp.float32), jnp.array(head, jnp.float32)
    (total, stats), found = jax.value_and_grad(call, (0, 1), has_aux=True)(*inputs)
    loss, of_z = SAID[name](hidden @ head.T, y)
    of_z *= live[:, None]
    assert total == pytest.approx(loss[live].sum(), rel=1e-5)
    np.testing.assert_allclose(stats.loss, loss * live, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0], of_z @ head, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], of_z.T @ hidden, rtol=1e-4, atol=1e-5)
