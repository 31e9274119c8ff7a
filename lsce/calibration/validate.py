"""What a caller may pass, checked on the host before anything compiles.

Values can only be looked at when they are known: a tracer (inside `jit`, `scan`, `vmap`) or an
array that lives on other hosts goes through unchecked. The jitted metrics therefore poison whatever
these checks would have refused (`poisoned_samples`, `poisoned_classes`): the result is then NaN,
never a number that looks fine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from lsce.arguments import integer, number

ROUNDING = 1e-6
"""How far above 1 a float32 softmax may round; such values are read as 1."""


def known(x: ArrayLike) -> bool:
    """Whether the values of `x` can be read here and now."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def to_array(x: ArrayLike) -> Array:
    """`x` as a jax array; one sharded over explicit mesh axes is gathered first."""
    array = jnp.asarray(x)
    sharding = jax.typeof(array).sharding
    if any(axes is not None for axes in sharding.spec):
        array = jax.reshard(array, sharding.update(spec=jax.P()))
    return array


def positive_int(name: str, value: int) -> int:
    """`value`, refused unless it is a Python integer of at least 1."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def unit_interval(name: str, value: float, *, open_ends: bool = False) -> float:
    """`value`, refused unless it is a number in [0, 1], or in (0, 1) with `open_ends`."""
    value = number(name, value)
    inside = 0 < value < 1 if open_ends else 0 <= value <= 1
    if not inside:
        raise ValueError(f"{name} must lie in {'(0, 1)' if open_ends else '[0, 1]'}, got {value}")
    return value


def real_array(name: str, x: ArrayLike) -> Float[Array, "*samples"]:
    """`x` as float32, or as float64 when it is that and jax's x64 mode is on."""
    array = to_array(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a float array, got dtype {array.dtype}")
    return array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def same_shape(name: str, x: Array, expected: tuple[int, ...], other: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, but {other} has shape {expected}")


def refuse(name: str, x: ArrayLike, bad: np.ndarray, rule: str) -> None:
    """Raises ValueError naming the first value of `x` where `bad` holds, if any does."""
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        value = np.asarray(x)[where]
        index = ", ".join(map(str, where))
        raise ValueError(
            f"{name} must {rule}, got {value} at [{index}] ({int(bad.sum())} such of {bad.size})"
        )


def samples(
    confidence: ArrayLike, correct: ArrayLike, weights: ArrayLike | None = None
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """Confidences, correctness and weights as three float vectors of one length.

    Any common shape is flattened. `correct` may be boolean or hold zeros and ones; `weights` may be
    boolean (a mask) or numeric, None meaning ones. A sample of weight 0 may hold anything.

    Raises ValueError for shapes that differ, no samples, a confidence that is NaN or outside
    [0, 1], a correctness that is neither 0 nor 1, weights that are negative or not finite, or that
    are all zero; TypeError for integer confidences.
    """
    p = real_array("confidence", confidence)
    a = to_array(correct)
    w = jnp.ones(p.shape, p.dtype) if weights is None else weight_array(weights)
    same_shape("correct", a, p.shape, "confidence")
    same_shape("weights", w, p.shape, "confidence")
    if p.size == 0:
        raise ValueError(f"confidence has no samples (shape {p.shape}), so no calibration either")
    if known(confidence) and known(correct) and (weights is None or known(weights)):
        counted = np.ones(p.shape, bool) if weights is None else np.asarray(weights) != 0
        check_confidence(confidence, counted)
        check_correct(correct, counted)
    return p.ravel(), a.astype(p.dtype).ravel(), w.astype(p.dtype).ravel()


def weight_array(weights: ArrayLike) -> Array:
    """Weights or a mask as an array. Those that are known are checked here, and scaled before they
    are rounded: only their ratios matter, and float32 may not hold the weights themselves."""
    if not known(weights):
        return to_array(weights)
    host = np.asarray(weights, np.float64)
    refuse("weights", weights, ~((host >= 0) & (host < np.inf)), "be finite and at least 0")
    if host.size and not host.any():
        raise ValueError(f"all {host.size} weights are 0: no sample is left to measure")
    _, exponent = np.frexp(host.max(initial=0))
    return to_array(np.ldexp(host, 1 - exponent))


def check_confidence(confidence: ArrayLike, counted: np.ndarray) -> None:
    """Refuses NaN and anything outside [0, 1 + ROUNDING] where `counted` holds."""
    host = np.asarray(confidence, np.float64)
    bad = ~((host >= 0) & (host <= 1 + ROUNDING)) & counted
    refuse("confidence", confidence, bad, "be a probability in [0, 1]")


def check_correct(correct: ArrayLike, counted: np.ndarray) -> None:
    """Refuses anything but 0 and 1 where `counted` holds."""
    host = np.asarray(correct, np.float64)
    refuse("correct", correct, ~((host == 0) | (host == 1)) & counted, "be 0 or 1")


def classified(probs: ArrayLike, labels: ArrayLike) -> tuple[Float[Array, "N K"], Int[Array, " N"]]:
    """Class probabilities and labels.

    A row may sum to less than 1 (the letters A to D cut out of a whole vocabulary's softmax), never
    to more.

    Raises ValueError for wrong ranks or lengths, no samples, a probability that is NaN or outside
    [0, 1], a row that sums to more than 1, or a label outside [0, K); TypeError for integer
    probabilities or labels that are not integers.
    """
    p = real_array("probs", probs)
    y = label_vector(labels, p, "probs")
    most = 1 + (1e-3 if to_array(probs).dtype.itemsize >= 4 else 0.05)
    if known(probs):
        host = np.asarray(probs, np.float64)
        refuse("probs", probs, ~((host >= 0) & (host <= 1 + ROUNDING)), "lie in [0, 1]")
        sums = host.sum(1)
        refuse("the sum of a row of probs", sums, sums > most, "be at most 1")
    # Here and not with the rest (`poisoned_classes`): later the dtype they came in is not known.
    return jnp.where(jnp.sum(p, axis=1, keepdims=True) > most, jnp.nan, p), y


def label_vector(labels: ArrayLike, scores: Float[Array, "N K"], name: str) -> Int[Array, " N"]:
    """Labels [N] that index the columns of `scores` [N, K], which `name` names in messages."""
    y = to_array(labels)
    if scores.ndim != 2 or scores.shape[0] == 0 or scores.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, K] with N, K ≥ 1, got {scores.shape}")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {y.dtype}")
    same_shape("labels", y, scores.shape[:1], f"the first axis of {name}")
    if known(labels):
        host = np.asarray(labels)
        bad = (host < 0) | (host >= scores.shape[1])
        refuse("labels", labels, bad, f"lie in [0, {scores.shape[1]})")
    return y.astype(int)


def poisoned_samples(
    p: Float[Array, " N"], a: Float[Array, " N"], w: Float[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """Samples with NaN in place of what is no confidence, correctness or weight; jit-safe.

    What a sample of weight 0 holds is replaced by zeros: it can poison nothing. Without any other
    there is nothing to measure, and all is NaN. The weights are scaled by a power of two so that
    the largest is near 1: no sum of them overflows.
    """
    valid = (w >= 0) & (w < jnp.inf) & jnp.any(w > 0)
    _, exponent = jnp.frexp(lax.stop_gradient(jnp.max(jnp.where(valid, w, 0))))
    w = jnp.where(valid, jnp.ldexp(w, 1 - exponent), jnp.nan)
    p = jnp.where((p >= 0) & (p <= 1 + ROUNDING), jnp.minimum(p, 1), jnp.nan)
    p = jnp.where(w == 0, 0, p)
    a = jnp.where(w == 0, 0, jnp.where((a == 0) | (a == 1), a, jnp.nan))
    return p, a, w


def poisoned_classes(probs: Float[Array, "N K"], labels: Int[Array, " N"]) -> Float[Array, "N K"]:
    """`probs` with a row of NaN wherever the row or its label is invalid; jit-safe."""
    valid = jnp.all((probs >= 0) & (probs <= 1 + ROUNDING), axis=1)
    valid &= (labels >= 0) & (labels < probs.shape[1])
    return jnp.where(valid[:, None], jnp.minimum(probs, 1), jnp.nan)
