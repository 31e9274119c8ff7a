"""The formulas where rounding is all there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsce


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("softcap", [None, 2e9])
def test_logits_of_billions_have_probabilities(implementation, softcap):
    """Where a compiler contracts z − max z with the scale, the largest p was e^40, or infinite."""
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((24, 8)), rng.standard_normal((50, 8))
    given = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]

    def loss(hidden, head):
        return lsce.linear_cross_entropy(
            hidden,
            head,
            jnp.arange(24),
            logit_scale=1e9,
            softcap=softcap,
            return_stats=True,
            implementation=implementation,
        )

    (value, stats), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*given)
    logits = 1e9 * hidden @ head.T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    expected = np.mean(logits.max(1) - logits[np.arange(24), np.arange(24)])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(stats.confidence, 1.0, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, 0.0, atol=1e-6)
    assert all(np.isfinite(g).all() and g.any() for g in grads)
