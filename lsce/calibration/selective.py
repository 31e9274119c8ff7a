"""Selective prediction: is confidence higher where the model is right, so that it can abstain well?

A calibration error says whether the numbers are right on average; these say whether they put right
answers before wrong ones. Neither implies the other: a model that always says its accuracy is
perfectly calibrated and cannot tell anything apart. Nothing here depends on the order of the
samples, nor on more of the confidences than their order: equal ones count as drawn in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

from lsce.calibration import validate
from lsce.calibration.bins import sortable
from lsce.calibration.scores import mean


class RiskCoverage(NamedTuple):
    """What is answered and what that costs, from the surest sample alone to all N."""

    coverage: Float[Array, " N"]
    """i/N: the share of the samples that is answered."""
    risk: Float[Array, " N"]
    """The share of wrong ones among the i samples of highest confidence."""


def auroc(
    confidence: Float[ArrayLike, "*samples"], correct: Real[ArrayLike, "*samples"]
) -> Float[Array, ""]:
    """P(c⁺ > c⁻) + P(c⁺ = c⁻)/2 for the confidences c⁺ of a right and c⁻ of a wrong prediction.

    The area under the ROC curve of "the prediction is right": 1 where every right one is surer than
    every wrong one, 1/2 where confidence tells nothing. NaN where all are right or all wrong, as
    there are no pairs then. Raises what `validate.samples` says; NaN for invalid values inside
    `jit`.

    Source: Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747.

    >>> f"{auroc(np.array([0.9, 0.8, 0.8, 0.6]), np.array([1, 1, 0, 0])):.3f}"
    '0.875'
    """
    return _auroc(*validate.samples(confidence, correct))


@jax.jit
def _auroc(confidence, correct, weights):
    confidence, correct, _ = validate.poisoned_samples(confidence, correct, weights)
    order = jnp.argsort(sortable(confidence))
    c, right = confidence[order], correct[order] == 1
    wrong_before = jnp.pad(jnp.cumsum(~right, dtype=jnp.int32), (1, 0))
    below, up_to = (wrong_before[at] for at in _equal(c))
    beaten = jnp.where(right, below.astype(c.dtype) + (up_to - below).astype(c.dtype) / 2, 0)
    wrong = wrong_before[-1].astype(c.dtype)
    defined = (wrong > 0) & (wrong < c.size)
    pairs = jnp.where(defined, wrong * mean(correct), jnp.nan)
    return mean(beaten) / pairs + 0 * jnp.sum(confidence)  # a NaN among them shows


def risk_coverage(
    confidence: Float[ArrayLike, "*samples"], correct: Real[ArrayLike, "*samples"]
) -> RiskCoverage:
    """The risk–coverage curve: the share of errors among the i surest, for i = 1 … N.

    Among equal confidences the errors are spread evenly: the risk is the mean over all orders that
    they could be taken in. Raises what `validate.samples` says; NaN for invalid values inside
    `jit`.

    Source: Geifman and El-Yaniv, 2017, https://arxiv.org/abs/1705.08500.
    """
    return _risk_coverage(*validate.samples(confidence, correct))


@jax.jit
def _risk_coverage(confidence, correct, weights):
    confidence, correct, _ = validate.poisoned_samples(confidence, correct, weights)
    order = jnp.argsort(sortable(confidence))[::-1]
    c, n = confidence[order], confidence.size
    errors_before = jnp.pad(jnp.cumsum(correct[order] == 0, dtype=jnp.int32), (1, 0))
    first, last = _equal(c)
    taken = jnp.arange(1, n + 1)
    before, equal = errors_before[first], errors_before[last] - errors_before[first]
    share = (taken - first).astype(c.dtype) / (last - first).astype(c.dtype)
    errors = before.astype(c.dtype) + equal.astype(c.dtype) * share
    poison = 0 * jnp.sum(confidence) + 0 * jnp.sum(correct)
    return RiskCoverage(taken.astype(c.dtype) / n, errors / taken.astype(c.dtype) + poison)


def _equal(c: Float[Array, " N"]) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Of each of sorted values, where those that equal it begin, and where they have ended."""
    apart, end = c[1:] != c[:-1], jnp.ones(1, bool)
    i = jnp.arange(c.size)
    begins = jnp.where(jnp.concatenate([end, apart]), i, 0)
    ends = jnp.where(jnp.concatenate([apart, end]), i + 1, c.size)
    return jax.lax.cummax(begins), jax.lax.cummin(ends, reverse=True)


def aurc(
    confidence: Float[ArrayLike, "*samples"], correct: Real[ArrayLike, "*samples"]
) -> Float[Array, ""]:
    """The area under `risk_coverage`, (1/N) Σ_i risk_i, in [0, 1]: lower is better.

    It falls with better accuracy as well as with better order. Raises what `validate.samples` says;
    NaN for invalid values inside `jit`.

    Source: Geifman, Uziel and El-Yaniv, 2019, https://arxiv.org/abs/1805.08206.

    >>> f"{aurc(np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1])):.4f}"
    '0.2778'
    """
    return mean(risk_coverage(confidence, correct).risk)
