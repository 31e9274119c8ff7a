"""Smooth ECE: a calibration error without bins.

The residuals confidence − correct are smoothed along the confidence axis by a Gaussian that is
reflected at 0 and 1, and the error is the average of their absolute value over the smoothed
samples. A narrow Gaussian sees noise and a wide one cancels real errors; the method's bandwidth is
the one that equals the error it gives, a single point because the error falls as the bandwidth
grows.
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
BLOCK = 200
"""Mesh points at which the smoothed residuals are read at once, and the fewest there are."""
NARROWEST = 1e-3
"""No bandwidth below this is tried."""
HALVINGS = 10
"""Bisections that find the bandwidth, to within 2⁻¹⁰."""
REACH = 0.5
"""Where the Gaussian is cut off."""


def smooth_calibration_error(
    confidence: Float[ArrayLike, "*samples"], correct: Real[ArrayLike, "*samples"]
) -> Float[Array, ""]:
    """smECE = Σ_t |Σ_n K_σ(t, p_n)(p_n − a_n)| / Σ_t Σ_n K_σ(t, p_n) at the σ for which smECE = σ.

    p_n is a confidence, a_n the correctness, K_σ the reflected Gaussian and t an even mesh over
    [0, 1]. Unlike ECE it changes continuously with the confidences, and no number of bins has to be
    chosen. Discretised as its authors' package `relplot` does (bandwidth to 2⁻¹⁰, 200 mesh points
    and more for narrow bandwidths), so that values compare; the integral itself can be some 10⁻³
    away.

    Raises what `validate.samples` says; NaN for invalid values inside `jit`.

    Source: Błasiok and Nakkiran, 2023, https://arxiv.org/abs/2309.12236.
    """
    return _smooth(*validate.samples(confidence, correct))


@jax.jit
def _smooth(confidence, correct, weights):
    confidence, correct, _ = validate.poisoned_samples(confidence, correct, weights)
    gathered = _gather(confidence, confidence - correct)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        too_narrow = (middle < NARROWEST) | (middle < _error(gathered, middle))
        return jnp.where(too_narrow, middle, low), jnp.where(too_narrow, high, middle)

    ends = jnp.zeros((), confidence.dtype), jnp.ones((), confidence.dtype)
    _, bandwidth = jax.lax.fori_loop(0, HALVINGS, halve, ends)
    return _error(gathered, bandwidth)


def _gather(confidence, residual) -> Float[Array, "G 2"]:
    """Residuals and sample counts on the grid, each sample shared by its two nearest points."""
    place = confidence * (GRID - 1)
    left = jnp.clip(place.astype(jnp.int32), 0, GRID - 2)
    to_right = (place - left.astype(place.dtype))[:, None]
    values = jnp.stack([residual, jnp.ones_like(residual)], axis=1)
    return sums_by_bin(values * (1 - to_right), left, GRID) + sums_by_bin(
        values * to_right, left + 1, GRID
    )


@jax.custom_batching.custom_vmap
def _error(gathered: Float[Array, "G 2"], bandwidth: Float[Array, ""]) -> Float[Array, ""]:
    """smECE at one bandwidth σ, over a mesh of 10/σ points."""
    return _errors(gathered[None], bandwidth)[0]


@_error.def_vmap
def _error_of_each(
    size: int, batched: list[bool], gathered: Float[Array, "S G 2"], bandwidth: Float[Array, " S"]
) -> tuple[Float[Array, " S"], bool]:
    """The same of S sets of samples: a kernel, which is nearly all of the work, is made once for
    all that try its bandwidth. Resamples of one set try the same few."""
    gathered, bandwidth = (
        x if each else jnp.broadcast_to(x, (size, *x.shape))
        for x, each in zip((gathered, bandwidth), batched, strict=True)
    )

    def try_next(state):
        left, found = state
        width = bandwidth[jnp.argmax(left)]  # never NaN: a bisection of [0, 1]
        tried = bandwidth == width
        return left & ~tried, jnp.where(tried, _errors(gathered, width), found)

    start = jnp.ones(size, bool), jnp.zeros(size, gathered.dtype)
    return jax.lax.while_loop(lambda state: jnp.any(state[0]), try_next, start)[1], True


def _errors(gathered: Float[Array, "S G 2"], bandwidth: Float[Array, ""]) -> Float[Array, " S"]:
    sets = gathered.shape[0]
    columns = gathered.swapaxes(0, 1).reshape(GRID, sets * 2)
    grid = jnp.linspace(0, 1, GRID, dtype=gathered.dtype)[None, :]
    points = jnp.maximum(jnp.round(10 / bandwidth), BLOCK)

    def gaussian(distance):
        height = jnp.exp(-jnp.square(distance / bandwidth) / 2)
        return jnp.where(jnp.abs(distance) <= REACH, height, 0)

    def add_block(i, sums):
        index = i * BLOCK + jnp.arange(BLOCK)
        t = (index.astype(points.dtype) / (points - 1))[:, None]
        kernel = gaussian(t - grid) + gaussian(t + grid) + gaussian(2 - t - grid)
        smoothed = jnp.matmul(kernel, columns, precision=jax.lax.Precision.HIGHEST)
        inside = (index < points.astype(jnp.int32))[:, None, None]
        smoothed = jnp.where(inside, smoothed.reshape(BLOCK, sets, 2), 0)
        residual, density = jnp.abs(smoothed[..., 0]), smoothed[..., 1]
        return sums + jnp.stack([jnp.sum(residual, axis=0), jnp.sum(density, axis=0)])

    blocks = jnp.ceil(points / BLOCK).astype(jnp.int32)
    zero = jnp.zeros((2, sets), gathered.dtype)
    residual, density = jax.lax.fori_loop(0, blocks, add_block, zero)
    return residual / density
