"""Calibration errors over all classes: is each class's probability right, not only the top one's?

Each metric is the mean over the K classes of an ECE in which the confidence is p_k and the event is
"the label is k". They differ in their bins:

| metric | bins of each class |
| --- | --- |
| `static_calibration_error` (SCE) | 30 even bins |
| `classwise_ece` | the same with 15, as the top-label ECE has |
| `adaptive_calibration_error` (ACE) | 30 equal-mass bins |
| `thresholded_adaptive_calibration_error` (TACE) | the same, of the probabilities above 0.01 only |

Most probabilities of a large vocabulary are close to 0 and perfectly calibrated there, and so bring
the mean down as K grows; TACE is there to leave them out. All take probs [N, K] and labels [N],
return a scalar, raise what `validate.classified` says, and give NaN for invalid values inside
`jit`.

Sources: Nixon et al., 2019, https://arxiv.org/abs/1904.01685; Kumar, Liang and Ma, 2019,
https://arxiv.org/abs/1909.10155 (classwise).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from lsce.calibration import validate
from lsce.calibration.bins import equal_mass_edges, even_edges, tabulate

CLASSES_AT_ONCE = 64
"""How many classes are sorted side by side; bounds memory for large K."""


def static_calibration_error(
    probs: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"], *, bins: int = 30
) -> Float[Array, ""]:
    """SCE = (1/K) Σ_k Σ_b n_kb/N · |acc_kb − conf_kb| over even bins b of each class k."""
    return _mean_over_classes(probs, labels, bins, adaptive=False)


def classwise_ece(
    probs: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"], *, bins: int = 15
) -> Float[Array, ""]:
    """(1/K) Σ_k ECE_k over even bins: SCE with the number of bins that is usual for ECE."""
    return _mean_over_classes(probs, labels, bins, adaptive=False)


def adaptive_calibration_error(
    probs: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"], *, bins: int = 30
) -> Float[Array, ""]:
    """ACE = (1/K) Σ_k Σ_b n_kb/N · |acc_kb − conf_kb| over equal-mass bins b of each class k."""
    return _mean_over_classes(probs, labels, bins, adaptive=True)


def thresholded_adaptive_calibration_error(
    probs: Float[ArrayLike, "N K"],
    labels: Int[ArrayLike, " N"],
    *,
    bins: int = 30,
    threshold: float = 0.01,
) -> Float[Array, ""]:
    """TACE: ACE in which each class counts and bins only its probabilities above `threshold`.

    A class without any contributes 0. ValueError for a threshold outside [0, 1].
    """
    threshold = validate.unit_interval("threshold", threshold)
    return _mean_over_classes(probs, labels, bins, adaptive=True, threshold=threshold)


def _mean_over_classes(probs, labels, bins, *, adaptive, threshold=None):
    bins = validate.positive_int("bins", bins)
    return _class_errors(*validate.classified(probs, labels), bins, adaptive, threshold)


@functools.partial(jax.jit, static_argnames=("bins", "adaptive", "threshold"))
def _class_errors(probs, labels, bins: int, adaptive: bool, threshold: float | None):
    probs = validate.poisoned_classes(probs, labels)

    def class_error(p_and_k):
        p, k = p_and_k
        # Written so that NaN is kept and shows in the result.
        kept = jnp.ones(p.shape, bool) if threshold is None else ~(p <= threshold)
        edges = equal_mass_edges(p, kept, bins, "round") if adaptive else even_edges(bins, p.dtype)
        is_k = (labels == k).astype(p.dtype)
        table = tabulate(jnp.where(kept, p, 0), is_k, kept.astype(p.dtype), edges)
        return jnp.where(jnp.any(kept), jnp.sum(table.share * jnp.abs(table.gap)), 0)

    classes = jnp.arange(probs.shape[1])
    batch = min(CLASSES_AT_ONCE, classes.size)
    return jnp.mean(jax.lax.map(class_error, (probs.T, classes), batch_size=batch))
