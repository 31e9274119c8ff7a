"""Smooth ECE: a calibration error without bins.

The residuals confidence − correct are smoothed along the confidence axis by a Gaussian that is
reflected at 0 and 1, and the error is the average of their absolute value over the smoothed samples.
A narrow Gaussian sees noise and a wide one cancels real errors; the method's bandwidth is the one that
equals the error it gives, a single point because the error falls as the bandwidth grows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from lsce.calibration import validate
from lsce.calibration.bins import sums_by_bin

GRID = 2001
"""Points on [0, 1] at which the samples are gathered before smoothing."""
MESH = (200, 2000)
"""Fewest and most points at which the smoothed residuals are read: 10/σ of them in between."""
HALVINGS = 10
"""Bisections of the bandwidth, which it is found to within 2⁻¹⁰ by."""
NARROWEST = 1e-3
"""No bandwidth below this is tried."""
REACH = 0.5
"""Where the Gaussian is cut off."""


def smooth_calibration_error(
    confidence: Float[ArrayLike, "*samples"], correct: Real[ArrayLike, "*samples"]
) -> Float[Array, ""]:
    """smECE = Σ_t |Σ_n K_σ(t, p_n)(p_n − a_n)| / Σ_t Σ_n K_σ(t, p_n) at the σ for which smECE = σ.

    p_n is a confidence, a_n the correctness, K_σ the reflected Gaussian and t an even mesh over [0, 1].
    Unlike ECE it changes continuously with the confidences, and no number of bins has to be chosen.
    Discretised as its authors' package `relplot` does (bandwidth to 2⁻¹⁰, 200 mesh points and more for
    narrow bandwidths), so that values compare; the integral itself is up to 10⁻³ away.

    Raises what `validate.samples` says; NaN for invalid values inside `jit`.

    Source: Błasiok and Nakkiran, 2023, https://arxiv.org/abs/2309.12236.
    """
    return _smooth(*validate.samples(confidence, correct))


@jax.jit
def _smooth(confidence, correct, weights):
    confidence, correct, _ = validate.poisoned_samples(confidence, correct, weights)
    spectrum = _spectrum(_gather(confidence, confidence - correct))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        too_narrow = (middle < NARROWEST) | (middle < _error(spectrum, middle))
        return jnp.where(too_narrow, middle, low), jnp.where(too_narrow, high, middle)

    ends = jnp.zeros((), confidence.dtype), jnp.ones((), confidence.dtype)
    _, bandwidth = jax.lax.fori_loop(0, HALVINGS, halve, ends)
    return _error(spectrum, bandwidth)


def _gather(confidence, residual) -> Float[Array, "2 G"]:
    """Residuals and sample counts on the grid, each sample shared by its two nearest points."""
    place = confidence * (GRID - 1)
    left = jnp.clip(place.astype(jnp.int32), 0, GRID - 2)
    to_right = (place - left)[:, None]
    values = jnp.stack([residual, jnp.ones_like(residual)], axis=1)
    return (
        sums_by_bin(values * (1 - to_right), left, GRID)
        + sums_by_bin(values * to_right, left + 1, GRID)
    ).T


def _spectrum(values: Float[Array, "2 G"]):
    """Fourier transform of the values continued by reflection, with period 2(G − 1)."""
    # The two end points are their own mirror images, and count twice for it.
    values = values.at[:, 0].multiply(2).at[:, -1].multiply(2)
    return jnp.fft.rfft(jnp.concatenate([values, values[:, -2:0:-1]], axis=1))


def _error(spectrum, bandwidth):
    """smECE at one bandwidth."""
    offset = jnp.arange(2 * (GRID - 1)) / (GRID - 1)
    offset = jnp.minimum(offset, 2 - offset)
    kernel = jnp.where(offset <= REACH, jnp.exp(-jnp.square(offset / bandwidth) / 2), 0)
    smoothed = jnp.fft.irfft(spectrum * jnp.fft.rfft(kernel))[:, :GRID]

    points = jnp.clip(jnp.round(10 / bandwidth), *MESH)
    index = jnp.arange(MESH[1])
    place = index / (points - 1) * (GRID - 1)
    left = jnp.clip(place.astype(jnp.int32), 0, GRID - 2)
    share = place - left
    read = smoothed[:, left] * (1 - share) + smoothed[:, left + 1] * share
    residual, density = jnp.where(index < points, read, 0)
    return jnp.sum(jnp.abs(residual)) / jnp.sum(density)
