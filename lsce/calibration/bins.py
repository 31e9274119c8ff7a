"""Bins of confidence: where their edges lie, and what falls into each.

A bin is [a, b): a confidence equal to an edge belongs to the bin above it, and the last bin is
closed, so that 1.0 has a bin. Edges are values, never ranks: equal confidences always share a bin,
and no result depends on the order of the samples.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lsce.calibration import validate

Spread = Literal["front", "round"]
"""Where equal-mass bins put the remainder r of N = q·B + r: one more sample in each of the first r
bins (as `numpy.array_split`, netcal and uncertainty-calibration do), or spread out by rounding the
ranks i·N/B half to even (as robustness-metrics and Hendrycks et al.'s code do)."""


class Table(NamedTuple):
    """Per-bin sums over B bins."""

    weight: Float[Array, " B"]
    """Σ w."""
    confidence: Float[Array, " B"]
    """Σ w·confidence."""
    correct: Float[Array, " B"]
    """Σ w·correct."""

    @property
    def share(self) -> Float[Array, " B"]:
        """The bin's share of all weight, n_b/N."""
        return self.weight / jnp.sum(self.weight)

    @property
    def gap(self) -> Float[Array, " B"]:
        """conf_b − acc_b, 0 in empty bins; positive where the model is over-confident."""
        return (self.confidence - self.correct) / jnp.where(self.weight == 0, 1, self.weight)


def even_edges(bins: int, dtype: DTypeLike) -> Float[Array, " B-1"]:
    """The inner edges 1/B … (B−1)/B, each the nearest number of `dtype`."""
    return jnp.arange(1, bins, dtype=dtype) / bins


def equal_mass_edges(
    values: Float[Array, " N"], counted: Bool[Array, " N"], bins: int, spread: Spread = "front"
) -> Float[Array, " B-1"]:
    """Inner edges between which equally many of the counted values lie.

    An edge is the first value of the bin above it. With more bins than values, or with many equal
    values, some bins stay empty.
    """
    n = jnp.sum(counted)
    i = jnp.arange(1, bins)
    if spread == "front":
        rank = i * (n // bins) + jnp.minimum(i, n % bins)
    else:
        rank = i * (n // bins) + jnp.round(i * (n % bins) / bins).astype(n.dtype)
    return jnp.sort(jnp.where(counted, values, jnp.inf))[jnp.minimum(rank, n - 1)]


@functools.partial(jax.jit, static_argnames=("bins", "equal_mass", "spread"))
def bin_samples(
    confidence: Float[Array, " N"],
    correct: Float[Array, " N"],
    weights: Float[Array, " N"],
    bins: int,
    equal_mass: bool = False,
    spread: Spread = "front",
) -> Table:
    """The table of the samples that `validate.samples` returns; NaN where one is invalid."""
    confidence, correct, weights = validate.poisoned_samples(confidence, correct, weights)
    if equal_mass:
        edges = equal_mass_edges(confidence, weights != 0, bins, spread)
    else:
        edges = even_edges(bins, confidence.dtype)
    return tabulate(confidence, correct, weights, edges)


def tabulate(
    confidence: Float[Array, " N"],
    correct: Float[Array, " N"],
    weights: Float[Array, " N"],
    edges: Float[Array, " B-1"],
) -> Table:
    """Sorts the samples into the bins between `edges`; a NaN makes its bin NaN."""
    columns = jnp.stack([weights, weights * confidence, weights * correct], axis=1)
    index = jnp.searchsorted(edges, confidence, side="right")
    return Table(*sums_by_bin(columns, index, edges.size + 1).T)


def sums_by_bin(
    values: Float[Array, "N C"], index: Int[Array, " N"], bins: int
) -> Float[Array, "B C"]:
    """Σ of the rows of `values` in each bin, accurate in float32 however large N is.

    A bin's rows are dealt out to about √N partial sums, which are then added: a running float32 sum
    would stop counting at 2²⁴ and lose digits long before.
    """
    n, columns = values.shape
    partials = max(1, min(math.isqrt(n), n // bins))
    cell = index * partials + jnp.arange(n) % partials
    sums = jax.ops.segment_sum(values, cell, bins * partials)
    return jnp.sum(sums.reshape(bins, partials, columns), axis=1)
