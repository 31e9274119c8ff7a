"""Proper scores: the Brier score and the negative log-likelihood of class probabilities."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

from lsce.calibration import validate
from lsce.calibration.bins import bin_of, even_edges, sums_by_bin, tabulate


def brier_score(probs: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"]) -> Float[Array, ""]:
    """(1/N) Σ_n Σ_k (p_nk − [k = y_n])², summed over classes: in [0, 2], 0 at best.

    Raises what `validate.classified` says; NaN for invalid values inside `jit`.

    Source: Brier, 1950, https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    return _brier(*validate.classified(probs, labels))


@jax.jit
def _brier(probs, labels):
    probs = validate.poisoned_classes(probs, labels)
    target = jax.nn.one_hot(labels, probs.shape[1], dtype=probs.dtype)
    return mean(jnp.sum(jnp.square(probs - target), axis=1))


def top_label_brier_score(
    confidence: Float[ArrayLike, "*samples"], correct: Real[ArrayLike, "*samples"]
) -> Float[Array, ""]:
    """(1/N) Σ_n (confidence_n − correct_n)², the Brier score of "the prediction is right".

    In [0, 1]. Raises what `validate.samples` says; NaN for invalid values inside `jit`.
    """
    return _top_label_brier(*validate.samples(confidence, correct))


@jax.jit
def _top_label_brier(confidence, correct, weights):
    confidence, correct, _ = validate.poisoned_samples(confidence, correct, weights)
    return mean(jnp.square(confidence - correct))


def negative_log_likelihood(
    probs: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"]
) -> Float[Array, ""]:
    """−(1/N) Σ_n log p_n,y_n in nats; infinite when a true class was given probability 0.

    Raises what `validate.classified` says; NaN for invalid values inside `jit`.
    """
    return _nll(*validate.classified(probs, labels))


@jax.jit
def _nll(probs, labels):
    probs = validate.poisoned_classes(probs, labels)
    target = jnp.take_along_axis(probs, labels[:, None], axis=1)[:, 0]
    return mean(-jnp.log(target))


class BrierDecomposition(NamedTuple):
    """brier_score = reliability − resolution + uncertainty + within_bins."""

    reliability: Float[Array, ""]
    """Σ_k Σ_b n_kb/N · (conf_kb − acc_kb)²: the squared calibration error; 0 is best."""
    resolution: Float[Array, ""]
    """Σ_k Σ_b n_kb/N · (acc_kb − acc_k)²: how far bins are from the base rate; more is better."""
    uncertainty: Float[Array, ""]
    """Σ_k acc_k · (1 − acc_k): the score of always predicting the base rates; the data's, not the
    model's."""
    within_bins: Float[Array, ""]
    """What averaging in bins hides: the variance of the probabilities in a bin less twice their
    covariance with the events. 0 when all probabilities in a bin are equal."""


def brier_decomposition(
    probs: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"], *, bins: int = 15
) -> BrierDecomposition:
    """Splits `brier_score` into calibration, sharpness and the data's own uncertainty.

    Summed over the K events "the label is k", each with B even bins of its probabilities, where
    conf_kb and acc_kb are the mean probability and the event's frequency in a bin, acc_k overall.
    Raises what `validate.classified` says; NaN for invalid values inside `jit`.

    Sources: Murphy, 1973; Stephenson, Coelho and Jolliffe, 2008,
    https://doi.org/10.1175/2007WAF2006116.1 (the terms within bins).
    """
    return _decompose(*validate.classified(probs, labels), validate.positive_int("bins", bins))


@functools.partial(jax.jit, static_argnames="bins")
def _decompose(probs, labels, bins: int) -> BrierDecomposition:
    probs = validate.poisoned_classes(probs, labels)
    edges = even_edges(bins, probs.dtype)

    def terms(p_and_k):
        p, k = p_and_k
        event = (labels == k).astype(p.dtype)
        table = tabulate(p, event, jnp.ones_like(p), edges)
        n = jnp.maximum(table.weight, 1)
        base = mean(event)
        # A sample's distance from the means of its bin.
        b = bin_of(p, edges)
        dp, devent = p - (table.confidence / n)[b], event - (table.correct / n)[b]
        return BrierDecomposition(
            reliability=jnp.sum(table.share * jnp.square(table.gap)),
            resolution=jnp.sum(table.share * jnp.square(table.correct / n - base)),
            uncertainty=base * (1 - base),
            within_bins=mean(dp * (dp - 2 * devent)),
        )

    per_class = jax.lax.map(terms, (probs.T, jnp.arange(probs.shape[1])))
    poison = 0 * jnp.sum(probs)  # NaN where a row is; the labels' own terms would hide it
    return jax.tree.map(lambda term: jnp.sum(term) + poison, per_class)


def mean(values: Float[Array, " N"]) -> Float[Array, ""]:
    """The mean, accurate in float32 however large N is."""
    index = jnp.zeros(values.shape, jnp.int32)
    return sums_by_bin(values[:, None], index, 1)[0, 0] / values.size
