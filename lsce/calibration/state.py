"""Calibration as a running total of fixed size: batch after batch, device after device."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real, UInt32

from lsce.calibration import exact, validate
from lsce.calibration.bins import bin_of, even_edges

UNIT = 2.0**-24
"""Confidences are summed in whole multiples of this: every float32 from 0.5 to 1 is one."""


class CalibrationResult(NamedTuple):
    """What a `CalibrationState` has seen, over all samples and bin by bin.

    The metrics are NaN when it saw nothing at all, or any invalid sample.
    """

    count: UInt32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Samples, invalid ones excluded; stays at 2³² − 1 from there on."""
    accuracy: Float[Array, ""]
    """Share of right predictions."""
    confidence: Float[Array, ""]
    """Mean confidence."""
    gap: Float[Array, ""]
    """confidence − accuracy: positive for an over-confident model."""
    ece: Float[Array, ""]
    """Σ_b n_b/N · |acc_b − conf_b|."""
    rms: Float[Array, ""]
    """√ Σ_b n_b/N · (acc_b − conf_b)², over these even bins, not bins of 100 samples."""
    mce: Float[Array, ""]
    """max_b |acc_b − conf_b|."""
    bin_count: UInt32[Array, " B"]
    """n_b."""
    bin_accuracy: Float[Array, " B"]
    """acc_b; 0 where the bin is empty."""
    bin_confidence: Float[Array, " B"]
    """conf_b; 0 where the bin is empty."""
    invalid: UInt32[Array, ""]
    """Samples with a confidence that is no probability, or a correctness that is not 0 or 1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CalibrationState:
    """Per-bin totals from which ECE, RMS, MCE, accuracy and the reliability diagram follow.

    A pytree of one small integer array, whatever the number of samples, so it can be carried
    through `scan`, donated, checkpointed, and added up over devices. The totals are exact
    (confidences are rounded to 2⁻²⁴ first): any split of the samples over batches, devices or
    hosts, in any order, gives the same state to the last bit. Methods return a new state.

    Arrays sharded over a mesh can be passed as they are. Inside `shard_map`, each device makes its
    own state and `psum` adds them up; to carry one through a `scan` there, tell jax that it differs
    from device to device: `jax.lax.pcast(CalibrationState.create(), axis_name, to="varying")`.

    >>> state = CalibrationState.create(bins=15)
    >>> state = state.update(np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 1, 0]))
    >>> f"{state.compute().ece:.4f}"
    '0.1000'
    """

    sums: UInt32[Array, "B 4 4"]
    """For each bin, as `exact` limbs: samples, right predictions, Σ confidence / UNIT, and samples
    that are invalid, all of them in the first bin."""

    @classmethod
    def create(cls, bins: int = 15) -> CalibrationState:
        """The state that has seen nothing, for B even bins."""
        bins = validate.positive_int("bins", bins)
        return cls(exact.zeros(bins, 4))

    @property
    def bins(self) -> int:
        """B."""
        return self.sums.shape[-3]

    def update(
        self,
        confidence: Float[ArrayLike, "*samples"],
        correct: Real[ArrayLike, "*samples"],
        mask: Bool[ArrayLike, "*samples"] | None = None,
    ) -> CalibrationState:
        """Adds samples: arrays of one shape, of which those where `mask` is False are left out.

        Outside `jit`, raises ValueError for shapes that differ, for a confidence that is NaN or
        outside [0, 1] and a correctness that is neither 0 nor 1 (where not masked). Inside, such a
        sample is counted as invalid, and `compute` gives NaN.
        """
        confidence = validate.real_array("confidence", confidence)
        correct = validate.to_array(correct)
        kept = jnp.ones(confidence.shape, bool) if mask is None else validate.to_array(mask)
        validate.same_shape("correct", correct, confidence.shape, "confidence")
        validate.same_shape("mask", kept, confidence.shape, "confidence")
        if kept.dtype != jnp.bool_:
            raise TypeError(f"mask must be boolean, got dtype {kept.dtype}")
        if validate.known(confidence) and validate.known(correct) and validate.known(kept):
            validate.check_confidence(confidence, np.asarray(kept))
            validate.check_correct(correct, np.asarray(kept))
        correct = correct.astype(confidence.dtype)
        return self.merge(_count(confidence.ravel(), correct.ravel(), kept.ravel(), self.bins))

    def merge(self, other: CalibrationState) -> CalibrationState:
        """The state that has seen what either has seen. ValueError when the bins differ."""
        if self.bins != other.bins:
            raise ValueError(f"states of {self.bins} and {other.bins} bins can't be merged")
        return _carried(jax.tree.map(jnp.add, self, other))

    def psum(self, axis_name: str | tuple[str, ...]) -> CalibrationState:
        """Inside `shard_map`: what all devices along the named axes have seen together."""
        return _carried(jax.lax.psum(self, axis_name))

    def compute(self) -> CalibrationResult:
        """Reads the metrics off the totals."""
        return _compute(self)


@jax.jit
def _carried(state: CalibrationState) -> CalibrationState:
    return jax.tree.map(exact.carry, state)


@functools.partial(jax.jit, static_argnames="bins")
def _count(confidence, correct, kept, bins: int) -> CalibrationState:
    valid = (confidence >= 0) & (confidence <= 1 + validate.ROUNDING)
    valid &= (correct == 0) | (correct == 1)
    # NaN compares as False, so that what is converted to integers below is always finite.
    confidence = jnp.where(valid, jnp.minimum(confidence, 1), 0)
    units = jnp.round(confidence / UNIT)
    columns = valid, valid & (correct == 1), units, ~valid
    columns = jnp.stack([column.astype(jnp.uint32) for column in columns], axis=1)
    columns = jnp.where(kept[:, None], columns, 0)
    index = bin_of(confidence, even_edges(bins, confidence.dtype))
    return CalibrationState(exact.sums_by_bin(columns, index, bins))


@jax.jit
def _compute(state: CalibrationState) -> CalibrationResult:
    overall = exact.total(state.sums)
    count, invalid = exact.as_uint32(overall[0]), exact.as_uint32(overall[3])
    accuracy, confidence = _means(overall)
    bin_accuracy, bin_confidence = _means(state.sums)
    gap = jnp.abs(bin_accuracy - bin_confidence)
    share = exact.as_float(state.sums[:, 0]) / jnp.maximum(exact.as_float(overall[0]), 1)
    readable = (count > 0) & (invalid == 0)
    return CalibrationResult(
        count=count,
        accuracy=jnp.where(readable, accuracy, jnp.nan),
        confidence=jnp.where(readable, confidence, jnp.nan),
        gap=jnp.where(readable, confidence - accuracy, jnp.nan),
        ece=jnp.where(readable, jnp.sum(share * gap), jnp.nan),
        rms=jnp.where(readable, jnp.sqrt(jnp.sum(share * jnp.square(gap))), jnp.nan),
        mce=jnp.where(readable, jnp.max(gap), jnp.nan),
        bin_count=exact.as_uint32(state.sums[:, 0]),
        bin_accuracy=bin_accuracy,
        bin_confidence=bin_confidence,
        invalid=invalid,
    )


def _means(
    sums: UInt32[Array, "*any 4 4"],
) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """Accuracy and mean confidence, 0 where there are no samples."""
    n, right, units, _ = jnp.moveaxis(exact.as_float(sums), -1, 0)
    n = jnp.maximum(n, 1)
    return right / n, units / n * UNIT
