"""The L2 calibration error without the bias that finite bins give it.

Even for a perfectly calibrated model, the accuracy observed in a bin of n_b samples misses the
confidence by chance, and squaring makes every miss count: the plug-in estimate of the squared error
is too large by about ȳ_b(1 − ȳ_b)/n_b a bin. The debiased one subtracts what chance is expected to
add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, Real

from lsce.arguments import boolean
from lsce.calibration import validate
from lsce.calibration.bins import bin_samples
from lsce.calibration.bootstrap import Interval, bootstrap_interval


def debiased_l2(
    confidence: Float[ArrayLike, "*samples"],
    correct: Real[ArrayLike, "*samples"],
    *,
    bins: int = 15,
    debias: bool = True,
) -> Float[Array, ""]:
    """√ max(0, Σ_b n_b/N · [(conf_b − ȳ_b)² − ȳ_b(1 − ȳ_b)/(n_b − 1)]) over equal-mass bins.

    ȳ_b is the bin's accuracy; a bin of one sample, whose variance nothing tells, contributes 0.
    With `debias=False`, the plug-in: the same without the subtracted term. Raises what
    `validate.samples` says; NaN for invalid values inside `jit`.

    Source: Kumar, Liang and Ma, 2019, https://arxiv.org/abs/1909.10155.
    """
    samples = validate.samples(confidence, correct)
    table = bin_samples(*samples, validate.positive_int("bins", bins), equal_mass=True)
    squared = jnp.square(table.gap)
    if boolean("debias", debias):
        accuracy = table.correct / jnp.maximum(table.weight, 1)
        chance = accuracy * (1 - accuracy) / jnp.maximum(table.weight - 1, 1)
        alone = (table.weight == 1) & ~jnp.isnan(squared)
        squared = jnp.where(alone, 0, squared - chance)
    return jnp.sqrt(jnp.maximum(jnp.sum(table.share * squared), 0))


def debiased_l2_interval(
    confidence: Float[ArrayLike, "*samples"],
    correct: Real[ArrayLike, "*samples"],
    *,
    key: Key[Array, ""],
    bins: int = 15,
    samples: int = 1000,
    level: float = 0.9,
) -> Interval:
    """Error bars of the L2 calibration error, by resampling the plug-in.

    Each resample adds chance to the plug-in once more, about as much as the data added to the
    truth: the interval is the bootstrap's "basic" one, which subtracts it, cut at 0. `estimate` is
    `debiased_l2`.

    Source: Kumar, Liang and Ma, 2019, section 5.
    """
    metric = _plug_in(validate.positive_int("bins", bins))
    low, _, high = bootstrap_interval(
        metric, confidence, correct, key=key, samples=samples, level=level, method="basic"
    )
    return Interval(jnp.maximum(low, 0), debiased_l2(confidence, correct, bins=bins), high)


@functools.cache
def _plug_in(bins: int) -> Callable[..., Float[Array, ""]]:
    """The same function each time, so that `bootstrap_interval` compiles it once."""
    return functools.partial(debiased_l2, bins=bins, debias=False)
