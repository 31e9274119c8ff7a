"""How far a metric would move had the samples been drawn again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, Real

from lsce.calibration import validate

VALUES_AT_ONCE = 1 << 20
"""How many resampled values are held side by side; bounds memory."""


class Interval(NamedTuple):
    """An estimate between the two ends of its confidence interval."""

    low: Float[Array, ""]
    estimate: Float[Array, ""]
    high: Float[Array, ""]


def bootstrap_interval(
    metric: Callable[..., Any],
    *arrays: ArrayLike,
    key: Key[Array, ""],
    weights: Real[ArrayLike, " N"] | None = None,
    samples: int = 1000,
    level: float = 0.95,
    method: Literal["percentile", "basic"] = "percentile",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Any:
    """The bootstrap interval of `metric(*arrays)`, from resampling the leading axis.

    Each resample draws N of the N samples with replacement. With q the quantiles of the metric over
    the resamples, m its value on the data and α = 1 − level, "percentile" gives
    [q(α/2), q(1 − α/2)] and "basic" gives [2m − q(1 − α/2), 2m − q(α/2)]. A calibration error grows
    when data are resampled, because the chance gaps in its bins do: the percentile interval then
    lies too high and may miss m altogether, and "basic" takes the shift back. But a basic interval
    may end where the metric cannot be, as an ECE above 1; `bounds` cuts it there, which costs no
    coverage, since the truth is inside. Resamples that the metric is not defined for, though it is
    for the data, are left out.

    Args:
      metric: any jit-able function of the arrays to a scalar, or to a tree of scalars: several
        metrics then share the resamples and one program. Other options go in with
        `functools.partial`. A new function object compiles anew.
      *arrays: arrays of one length N, resampled together.
      key: a key of `jax.random`; the same key gives the same interval.
      weights: a weight or a mask for each sample, which the metric takes as `weights`. Samples of
        weight 0 are never drawn: the interval is that of the others alone.
      samples: number of resamples.
      level: share of the distribution inside, in (0, 1).
      method: see above.
      bounds: the least and the greatest value of the metric, of each in a tree.

    Returns:
      An `Interval`, or a tree of them like the metric's.

    Raises ValueError for arrays of different lengths or none, a metric that is not scalar, samples
    below 1, a level outside (0, 1), an unknown method, bounds that do not ascend, and whatever the
    metric itself raises.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 22.

    >>> x = np.arange(100.0)
    >>> low, mean, high = bootstrap_interval(jnp.mean, x, key=jax.random.key(0))
    >>> f"{low:.1f} < {mean:.1f} < {high:.1f}"
    '44.1 < 49.5 < 55.0'
    """
    interval = interval_of(level, method, bounds)
    return jax.tree.map(
        interval, *resampled(metric, *arrays, key=key, weights=weights, samples=samples)
    )


def interval_of(
    level: float = 0.95,
    method: Literal["percentile", "basic"] = "percentile",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Callable[[Float[Array, ""], Float[Array, " samples"]], Interval]:
    """What makes an interval of an estimate and its resamples, as `bootstrap_interval` has it."""
    tail = (1 - validate.unit_interval("level", level, open_ends=True)) / 2
    if method not in ("percentile", "basic"):
        raise ValueError(f'method must be "percentile" or "basic", got {method!r}')
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must ascend, got {bounds}")

    def interval(estimate: Float[Array, ""], values: Float[Array, " samples"]) -> Interval:
        low, high = jnp.nanquantile(values, jnp.array([tail, 1 - tail], values.dtype))
        low, high = (jnp.where(jnp.isnan(estimate), jnp.nan, end) for end in (low, high))
        if method == "basic":
            low, high = (
                jnp.clip(end, *bounds) for end in (2 * estimate - high, 2 * estimate - low)
            )
        return Interval(low, estimate, high)

    return interval


class Resampled(NamedTuple):
    """A metric, or a tree of metrics: of the data, and of each resample of them."""

    estimate: Any
    values: Any
    """With an axis of resamples. Those of two models on the same samples with the same key belong
    together: the interval of their differences is a paired one."""


def resampled(
    metric: Callable[..., Any],
    *arrays: ArrayLike,
    key: Key[Array, ""],
    weights: Real[ArrayLike, " N"] | None = None,
    samples: int = 1000,
) -> Resampled:
    """What `bootstrap_interval` takes the quantiles of; arguments and errors as there."""
    samples = validate.positive_int("samples", samples)
    if not isinstance(key, jax.Array):
        raise TypeError(f"key={key!r}; must be a key such as jax.random.key(0)")
    data = tuple(validate.to_array(x) for x in arrays)
    lengths = [x.shape[:1] for x in data]
    if not data or lengths != lengths[:1] * len(data) or lengths[0] in ((), (0,)):
        raise ValueError(
            "the arrays must share a first axis of at least 1, "
            f"got shapes {', '.join(str(x.shape) for x in data) or 'of no arrays at all'}"
        )
    if weights is not None:
        shape = validate.to_array(weights).shape
        if shape != lengths[0]:
            raise ValueError(f"weights has shape {shape}, but there are {lengths[0][0]} samples")
        weights = validate.weight_array(weights)
    estimates = jax.tree.map(jnp.asarray, _value(metric, arrays, weights))
    for estimate in jax.tree.leaves(estimates):
        if estimate.shape != ():
            raise ValueError(f"metric must return a scalar, got shape {estimate.shape}")
    return Resampled(estimates, _resample(metric, data, weights, key, samples))


def _value(metric, arrays, weights) -> Any:
    return metric(*arrays) if weights is None else metric(*arrays, weights=weights)


@functools.partial(jax.jit, static_argnames=("metric", "samples"))
def _resample(metric, arrays, weights, key, samples: int) -> Any:
    """The metric's tree with a value for each resample in its leaves."""
    n = arrays[0].shape[0]
    drawn = n
    if weights is not None:  # the samples that count come first, and only they are drawn
        first = jnp.argsort(weights == 0, stable=True)
        arrays, weights = jax.tree.map(lambda x: x[first], (arrays, weights))
        drawn = jnp.maximum(jnp.sum(weights != 0), 1)

    def once(key):
        index = jax.random.randint(key, (n,), 0, drawn)
        kept = None if weights is None else jnp.where(jnp.arange(n) < drawn, weights[index], 0)
        return _value(metric, [x[index] for x in arrays], kept)

    # Whole batches only: a remainder would be compiled a second time.
    batches = min(samples, math.ceil(samples * n / VALUES_AT_ONCE))
    keys = jax.random.split(key, (batches, math.ceil(samples / batches)))
    drawn_values = jax.lax.map(jax.vmap(once), keys)
    return jax.tree.map(lambda x: x.ravel()[:samples], drawn_values)
