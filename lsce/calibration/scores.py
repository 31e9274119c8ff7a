"""Proper scores: the Brier score and the negative log-likelihood of class probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

from lsce.calibration import validate
from lsce.calibration.bins import sums_by_bin


def brier_score(probs: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"]) -> Float[Array, ""]:
    """(1/N) Σ_n Σ_k (p_nk − [k = y_n])², summed over classes: in [0, 2], 0 at best.

    Raises what `validate.classified` says; NaN for invalid values inside `jit`.

    Source: Brier, 1950, https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    return _brier(*validate.classified(probs, labels))


@jax.jit
def _brier(probs, labels):
    probs = validate.poisoned_classes(probs, labels)
    return mean(jnp.sum(jnp.square(probs - jax.nn.one_hot(labels, probs.shape[1])), axis=1))


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


def mean(values: Float[Array, " N"]) -> Float[Array, ""]:
    """The mean, accurate in float32 however large N is."""
    index = jnp.zeros(values.shape, jnp.int32)
    return sums_by_bin(values[:, None], index, 1)[0, 0] / values.size
