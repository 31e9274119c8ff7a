"""Temperature scaling: the one number that softens or sharpens a model's probabilities best."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from lsce.calibration import validate
from lsce.calibration.scores import mean

LIMIT = 1e3
"""Temperatures are looked for in [1/LIMIT, LIMIT]."""
ITERATIONS = 200
"""Steps at most. Some six are usual; in float64, halving alone would take two times 54."""


def fit_temperature(
    logits: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"]
) -> Float[Array, ""]:
    """The T that minimises (1/N) Σ_n −log softmax(logits_n / T)[y_n].

    Divide logits by it (`logit_scale=1/T` in `lsce.linear_cross_entropy`): predictions stay the
    same, T > 1 softens an over-confident model, T < 1 sharpens a shy one. Fit it on other data than
    it is judged on.

    The loss is convex in 1/T, so there is one minimum; it is found by Newton's method on log T
    inside a bracket. Logits that predict every label right have none (T → 0), nor have logits worse
    than chance (T → ∞): the result is then 0.001 or 1000, the ends of the range. A logit of −∞
    means a class that cannot be; a label there makes the result NaN.

    Raises ValueError for wrong ranks or lengths, no samples, a logit that is NaN or +∞, and a label
    outside [0, K); TypeError for integer logits or labels that are not integers. NaN for invalid
    values inside `jit`.

    Source: Guo et al., 2017, https://arxiv.org/abs/1706.04599.
    """
    z = validate.real_array("logits", logits)
    y = validate.label_vector(labels, z, "logits")
    if validate.known(logits):
        host = np.asarray(logits, np.float64)
        validate.refuse("logits", logits, ~(host < np.inf), "be less than infinity, and no NaN")
    return _fit(z, y)


@jax.jit
def _fit(logits, labels):
    valid = (labels >= 0) & (labels < logits.shape[1]) & jnp.all(logits < jnp.inf, axis=1)
    z = logits - jnp.max(logits, axis=1, keepdims=True)
    z = jnp.where(valid[:, None], z, jnp.nan)
    possible = z != -jnp.inf
    z_or_0 = jnp.where(possible, z, 0)
    target = jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]

    def slopes(log_scale):
        """First and second derivative of the mean loss by the scale 1/T."""
        p = jax.nn.softmax(jnp.where(possible, jnp.exp(log_scale) * z_or_0, -jnp.inf), axis=1)
        expected = jnp.sum(p * z_or_0, axis=1)
        variance = jnp.sum(p * jnp.square(z_or_0 - expected[:, None]), axis=1)
        return mean(expected - target), mean(variance)

    def unfinished(state):
        i, _, _, _, moved = state
        return (i < ITERATIONS) & (moved > 4 * jnp.finfo(z.dtype).eps)

    def step(state):
        i, log_scale, low, high, moved = state
        slope, curvature = slopes(log_scale)
        low, high = jnp.where(slope < 0, log_scale, low), jnp.where(slope < 0, high, log_scale)
        newton = log_scale - slope / (curvature * jnp.exp(log_scale))
        # Newton's steps are small and many where the loss is flat: halve the bracket instead.
        usable = (newton > low) & (newton < high) & (jnp.abs(newton - log_scale) < moved / 2)
        new = jnp.where(usable, newton, (low + high) / 2)
        return i + 1, new, low, high, jnp.abs(new - log_scale)

    limit = jnp.asarray(math.log(LIMIT), z.dtype)
    start = (0, jnp.zeros_like(limit), -limit, limit, limit)
    _, log_scale, _, _, _ = jax.lax.while_loop(unfinished, step, start)
    # At the ends the slope may have underflowed to 0, and means the same as its sign beside it.
    log_scale = jnp.where(slopes(limit)[0] <= 0, limit, log_scale)
    log_scale = jnp.where(slopes(-limit)[0] >= 0, -limit, log_scale)
    return jnp.where(jnp.all(valid) & jnp.all(target > -jnp.inf), jnp.exp(-log_scale), jnp.nan)
