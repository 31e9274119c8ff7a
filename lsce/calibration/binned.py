"""Calibration errors of the predicted class: how far accuracy is from confidence, bin by bin.

Every metric takes the confidence of each prediction and whether it was right, in any common shape
(`TokenStats.confidence` and `.correct` are such a pair), and returns a scalar: float32, or float64
for float64 input in jax's x64 mode. With acc_b and conf_b the mean correctness and confidence of
the n_b samples in bin b, and N = Σ n_b:

| metric | equation | bins |
| --- | --- | --- |
| `expected_calibration_error` | Σ_b n_b/N · abs(acc_b − conf_b) | even, or equal-mass |
| `rms_calibration_error` | √ Σ_b n_b/N · (acc_b − conf_b)² | equal-mass, about 100 samples each |
| `maximum_calibration_error` | max_b abs(acc_b − conf_b) | even, or equal-mass |
| `confidence_gap` | mean confidence − accuracy | one |

`weights` multiply a sample's part in every sum; 0 (or False: a mask) removes a sample. All raise
what `validate.samples` says, and give NaN for invalid values inside `jit`, where nothing can be
raised.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from lsce.arguments import boolean
from lsce.calibration import validate
from lsce.calibration.bins import Table, bin_samples


def expected_calibration_error(
    confidence: Float[ArrayLike, "*samples"],
    correct: Real[ArrayLike, "*samples"],
    *,
    bins: int = 15,
    equal_mass: bool = False,
    weights: Real[ArrayLike, "*samples"] | None = None,
) -> Float[Array, ""]:
    """ECE = Σ_b n_b/N · |acc_b − conf_b|, in [0, 1].

    Args:
      confidence: probability of the predicted class.
      correct: whether the prediction was right; boolean, or zeros and ones.
      bins: number of bins B.
      equal_mass: bins that hold equally many samples instead of B even intervals; the samples of
        positive weight are counted, one each.
      weights: a weight or a mask for each sample.

    Source: Naeini et al., 2015, https://doi.org/10.1609/aaai.v29i1.9602; Guo et al., 2017,
    https://arxiv.org/abs/1706.04599.

    >>> ece = expected_calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 1, 0]))
    >>> f"{ece:.4f}"
    '0.1000'
    """
    table = _table(confidence, correct, weights, bins, equal_mass)
    return jnp.sum(table.share * jnp.abs(table.gap))


def maximum_calibration_error(
    confidence: Float[ArrayLike, "*samples"],
    correct: Real[ArrayLike, "*samples"],
    *,
    bins: int = 15,
    equal_mass: bool = False,
    weights: Real[ArrayLike, "*samples"] | None = None,
) -> Float[Array, ""]:
    """MCE = max_b |acc_b − conf_b| over the bins that hold samples.

    One unlucky sample alone in its bin decides this number; read it beside the diagram. Arguments
    as in `expected_calibration_error`.

    Source: Naeini et al., 2015, https://doi.org/10.1609/aaai.v29i1.9602.
    """
    table = _table(confidence, correct, weights, bins, equal_mass)
    return jnp.max(jnp.abs(table.gap))


def rms_calibration_error(
    confidence: Float[ArrayLike, "*samples"],
    correct: Real[ArrayLike, "*samples"],
    *,
    bin_size: int = 100,
    weights: Real[ArrayLike, "*samples"] | None = None,
) -> Float[Array, ""]:
    """√ Σ_b n_b/N · (acc_b − conf_b)² over ⌊N/bin_size⌋ equal-mass bins (one when N < bin_size).

    N is the number of samples passed, those of weight 0 included, since bins are counted before
    anything runs; to evaluate part of an array, select it rather than mask it.

    Source: Hendrycks, Mazeika and Dietterich, 2019, https://arxiv.org/abs/1812.04606.
    """
    samples = validate.samples(confidence, correct, weights)
    table = bin_samples(*samples, _bins_of(samples[0].size, bin_size), True)
    return jnp.sqrt(jnp.sum(table.share * jnp.square(table.gap)))


def hendrycks_rms(
    confidence: Float[ArrayLike, "*samples"],
    correct: Real[ArrayLike, "*samples"],
    *,
    bin_size: int = 100,
) -> Float[Array, ""]:
    """√√ Σ_b (n_b/N · (acc_b − conf_b))²: what the code published with MMLU prints as "RMS".

    It squares the bins' shares along with their gaps and takes the root twice, so it is no average
    gap: with B bins of one size, √(true RMS) / B^¼. Only for comparison with numbers made by that
    code; `rms_calibration_error` is the metric it is named after.

    Source: `calib_tools.py` of https://github.com/hendrycks/test.
    """
    samples = validate.samples(confidence, correct)
    table = bin_samples(*samples, _bins_of(samples[0].size, bin_size), True, "round")
    return jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(table.share * table.gap))))


def confidence_gap(
    confidence: Float[ArrayLike, "*samples"],
    correct: Real[ArrayLike, "*samples"],
    *,
    weights: Real[ArrayLike, "*samples"] | None = None,
) -> Float[Array, ""]:
    """Mean confidence − accuracy: positive for an over-confident model, negative for a shy one."""
    table = bin_samples(*validate.samples(confidence, correct, weights), 1, False)
    return table.gap[0]


def _bins_of(n: int, bin_size: int) -> int:
    return max(1, n // validate.positive_int("bin_size", bin_size))


def _table(
    confidence: ArrayLike,
    correct: ArrayLike,
    weights: ArrayLike | None,
    bins: int,
    equal_mass: bool,
) -> Table:
    samples = validate.samples(confidence, correct, weights)
    bins = validate.positive_int("bins", bins)
    return bin_samples(*samples, bins, boolean("equal_mass", equal_mass))
