"""A timer for asynchronous calls, and the bare matmul that every time is held against."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SAMPLE_SECONDS = 0.1
"""One sample spans about this long, so that waiting for the device is a small part of it."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Percentiles over `samples` of the mean time of `launches` back-to-back calls, in ms."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    launches: int


def beside(
    calls: Sequence[Callable[[], Any]],
    wait: Callable[[Any], Any] | None = None,
    *,
    warmup: int = 3,
    seconds: float = 2.0,
) -> list[Timing]:
    """Times calls in turn, a sample of each, so that all see the same clocks.

    A short call is launched many times between two waits: an accelerator then runs the launches
    back to back, and the host's own time is hidden behind them.

    An accelerator at its power limit slows down within a tenth of a second of work: a call timed
    after a pause looks faster than it is beside one timed under load, and one timed after a call
    that draws much power slower. So the first turn is not counted, and of the others each has an
    order of its own, every second one that of the turn before backwards: always the same orders.

    Args:
      calls: what to time; each returns what `wait` waits for.
      wait: blocks until a result is there; `jax.block_until_ready` when None.
      warmup: untimed calls of each first, that also compile it, at least one.
      seconds: about how long to measure each; at least 5 samples are taken, and at most 20.
    """
    if warmup < 1:
        raise ValueError(f"{warmup=}; at least one call must compile and fill the caches")
    if wait is None:
        import jax

        wait = jax.block_until_ready
    for call in calls:
        for _ in range(warmup):
            wait(call())

    def sample(call: Callable[[], Any], launches: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(launches):
            result = call()
        wait(result)
        return (time.perf_counter() - start) / launches

    once = [sample(call, 1) for call in calls]
    longest = min(SAMPLE_SECONDS, seconds / 5)
    launches = [round(min(max(longest / each, 1), 1000)) for each in once]
    slowest = max(each * count for each, count in zip(once, launches, strict=True))
    samples = round(min(max(seconds / slowest, 5), 20))
    orders = np.random.default_rng(0)
    order = np.arange(len(calls))
    times = np.empty((1 + samples, len(calls)))
    for turn in range(1 + samples):
        order = order[::-1] if turn % 2 else orders.permutation(len(calls))
        for i in order:
            times[turn, i] = sample(calls[i], launches[i])
    percentiles = np.percentile(times[1:], (20, 50, 80), axis=0).T * 1e3
    return [
        Timing(float(p20), float(p50), float(p80), samples, count)
        for (p20, p50, p80), count in zip(percentiles, launches, strict=True)
    ]


def product(hidden: Any, head: Any) -> Callable[[], Any]:
    """The bare product E·Cᵀ of JAX arrays [N, D] and [V, D], written out in their dtype."""
    compiled = _product()
    return lambda: compiled(hidden, head)


@functools.cache
def _product() -> Any:
    import jax

    return jax.jit(lambda hidden, head: hidden @ head.T)


def tflops(n: int, d: int, v: int, milliseconds: float, products: int = 1) -> float:
    """TFLOP/s of `products` matrix products of 2·N·D·V operations each."""
    return products * 2 * n * d * v / (milliseconds * 1e9)
