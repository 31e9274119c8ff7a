"""Bins of confidence: where their edges lie, and what falls into each.

A bin is [a, b): a confidence equal to an edge belongs to the bin above it, and the last bin is
closed, so that 1.0 has a bin. Edges are values, never ranks: equal confidences always share a bin,
and no result depends on the order of the samples.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lsce.calibration import validate

Spread = Literal["front", "round"]
"""Where equal-mass bins put the remainder r of N = q·B + r: one more sample in each of the first r
bins (as `numpy.array_split`, netcal and uncertainty-calibration do), or spread out by rounding the
ranks i·N/B half to even (as robustness-metrics and Hendrycks et al.'s code do)."""

MOST_SPREAD_BINS = 1 << 16
"""Above this many bins, i·r would not fit into 32 bits."""


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
    # Divided by numpy: XLA may multiply by 1/B instead, and is then an ulp away.
    return jnp.asarray(np.arange(1, bins) / bins, dtype)


def equal_mass_edges(
    values: Float[Array, " N"], counted: Bool[Array, " N"], bins: int, spread: Spread = "front"
) -> Float[Array, " B-1"]:
    """Inner edges between which equally many of the counted values lie.

    An edge is the first value of the bin above it. With more bins than values, or with many equal
    values, some bins stay empty.
    """
    n = jnp.sum(counted, dtype=jnp.uint32)
    i = jnp.arange(1, bins, dtype=jnp.uint32)
    quotient, remainder = n // bins, n % bins
    if spread == "front":
        rank = i * quotient + jnp.minimum(i, remainder)
    elif bins > MOST_SPREAD_BINS:
        raise ValueError(f"{bins} bins are too many here; at most {MOST_SPREAD_BINS} are possible")
    else:
        rank = i * quotient + i * remainder // bins
        half = 2 * (i * remainder % bins)
        up = (half > bins) | ((half == bins) & (rank % 2 == 1))
        rank = rank + up.astype(jnp.uint32)
    ascending = jnp.sort(sortable(jnp.where(counted, values, jnp.inf)))
    bits = _turned(ascending[jnp.minimum(rank, n - 1)])  # turned over twice, they are as they were
    return jax.lax.bitcast_convert_type(bits, values.dtype)


def sortable(values: Float[Array, " N"]) -> Int[Array, " N"]:
    """Integers in the order of the numbers, NaN at an end, which XLA sorts two to five times faster
    on a CPU: their bits, those of negative ones but for the sign turned over."""
    integer = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    return _turned(jax.lax.bitcast_convert_type(values, integer))


def _turned(bits: Int[Array, " N"]) -> Int[Array, " N"]:
    info = jnp.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def bin_of(values: Float[Array, " N"], edges: Float[Array, " B-1"]) -> Int[Array, " N"]:
    """The bin each value lies in: how many edges are not above it. NaN counts as above them all."""
    return jnp.searchsorted(edges, values, side="right", method="scan_unrolled")


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
    return Table(*sums_by_bin(columns, bin_of(confidence, edges), edges.size + 1).T)


def sums_by_bin(
    values: Float[Array, "N C"], index: Int[Array, " N"], bins: int
) -> Float[Array, "B C"]:
    """Σ of the rows of `values` in each bin, accurate in float32 however large N is.

    A running float32 sum would stop counting at 2²⁴ and lose digits long before: a bin's rows are
    dealt out to partial sums of about 64 rows, which are then added in pairs.
    """
    n, columns = values.shape
    halvings = max(1, n // max(bins, 64)).bit_length() - 1
    cell = (index << halvings) | (jnp.arange(n, dtype=index.dtype) & ((1 << halvings) - 1))
    sums = jax.ops.segment_sum(values, cell, bins << halvings)
    sums = sums.reshape(bins, 1 << halvings, columns)
    for _ in range(halvings):
        sums = sums[:, ::2] + sums[:, 1::2]
    return sums[:, 0]
