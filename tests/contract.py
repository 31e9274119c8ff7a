"""What every backend of the loss is held to: the candidates, the truth and the tolerance.

The tests in test_loss.py run for every entry of `CANDIDATES`. A new backend inherits them by adding
one. The truth is the equation in numpy float64. The tolerance is the error of the naive loss, which
materialises its logits in the inputs' dtype: a backend may not be worse than twice that.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

import lsce
from lsce.backends import chunked, hopper

Shape = tuple[int, int, int]
Grads = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A backend under test, with the part of the problem space it takes.

    `shapes` are (N, D, V); the first one is the default of tests about something else, as the first
    of `dtypes` is. `patch` prepares a variant, such as a kernel's interpreter on a CPU.
    """

    implementation: str
    variant: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    shapes: tuple[Shape, ...] = ((127, 72, 257), (64, 16, 128), (3, 5, 2))
    patch: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def __str__(self) -> str:
        return "-".join(filter(None, (self.implementation, self.variant)))


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops over both axes, with a ragged end over the classes."""
    monkeypatch.setattr(chunked, "tile_size", lambda problem: chunked.Tile(64, 100))


def in_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's kernels on a CPU."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    monkeypatch.setattr(
        hopper.interpret, "active", (plgpu.InterpretGPUParams(), hopper.small_tiles())
    )


CANDIDATES = (
    Candidate("reference"),
    Candidate("chunked"),
    Candidate("chunked", "tiles", ("float32", "bfloat16"), ((128, 72, 257),), patch=small_tiles),
)
if hopper.choose.family(jax.devices()[0].device_kind):
    CANDIDATES += (Candidate("hopper", dtypes=("bfloat16",)),)
elif jax.default_backend() == "cpu":
    CANDIDATES += (
        Candidate(
            "hopper",
            "interpreted",
            ("bfloat16",),
            patch=in_interpreter,
            marks=(pytest.mark.slow,),
        ),
    )


class Inputs(NamedTuple):
    """The differentiable arrays of one call, in the candidate's dtype, and its labels."""

    hidden: np.ndarray
    head: np.ndarray
    labels: np.ndarray
    bias: np.ndarray | None = None
    weights: np.ndarray | None = None

    def differentiable(self) -> dict[str, np.ndarray]:
        arrays = {name: getattr(self, name) for name in ("hidden", "head", "bias", "weights")}
        return {name: array for name, array in arrays.items() if array is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Inputs and options of a call, with what is true of it and what the naive loss makes of it."""

    inputs: Inputs
    options: dict[str, Any]

    @functools.cached_property
    def truth(self) -> "Result":
        return truth(self.inputs, **self.options)

    @functools.cached_property
    def naive(self) -> "Result":
        return naive(self.inputs, **self.options)


@functools.cache
def case(
    shape: Shape,
    dtype: str = "float32",
    *,
    spread: float = 1.0,
    bias: bool = False,
    weights: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Logits of about the given spread; some classes frequent, some absent, some labels ignored.

    Hidden states and head have means that are not small, without which the smoothing terms, means
    themselves, would drown in the rounding of bfloat16.
    """
    n, d, v = shape
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((n, d)) + rng.standard_normal(d)
    head = (rng.standard_normal((v, d)) + rng.standard_normal(d)) * spread / np.sqrt(d)
    labels = rng.integers(0, max(1, v // 2), n) * rng.integers(0, 2, n)
    labels[: n // 8] = v - 1
    if n > 1:
        labels[rng.permutation(n)[: n // 4]] = -100
    kind = jnp.dtype(dtype)
    arrays = Inputs(
        hidden.astype(kind),
        (head if options.get("head_layout") != "dv" else head.T).astype(kind),
        labels.astype(np.int32),
        rng.standard_normal(v).astype(kind) if bias else None,
        np.where(rng.random(n) < 0.1, 0.0, rng.random(n)).astype(np.float32) if weights else None,
    )
    return Case(arrays, options)


def cotangent(n: int) -> np.ndarray:
    """What reduction="none" is summed with, so that no token's gradient is like another's."""
    return np.random.default_rng(1).standard_normal(n).astype(np.float32)


class Result(NamedTuple):
    value: np.ndarray
    grads: Grads
    stats: lsce.TokenStats | None = None


def result(loss: Callable[..., Any], given: Inputs, reduction: str = "mean") -> Result:
    """Value, gradients and statistics of `loss(inputs)`, compiled."""

    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(arrays):
        value = loss(given._replace(**arrays))
        value, stats = value if isinstance(value, tuple) else (value, None)
        total = jnp.vdot(value, cotangent(len(given.labels))) if reduction == "none" else value
        return total, (value, stats)

    arrays = jax.tree.map(jnp.asarray, given.differentiable())
    (_, (value, stats)), grads = jax.jit(objective)(arrays)
    return jax.tree.map(np.asarray, Result(value, grads, stats))


def ours(candidate: Candidate, given: Inputs, **options: Any) -> Result:
    """The candidate's result, exact unless the options say otherwise, with statistics."""
    options = {"gradient_filter": None, "return_stats": True} | options

    def loss(x):
        return lsce.linear_cross_entropy(
            x.hidden,
            x.head,
            x.labels,
            bias=x.bias,
            weights=x.weights,
            implementation=candidate.implementation,
            **options,
        )

    return result(loss, given, options.get("reduction", "mean"))


def naive(
    given: Inputs,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    head_layout: str = "vd",
) -> Result:
    """What one writes without this library: logits in the inputs' dtype, the rest in float32."""

    def loss(x):
        z = x.hidden @ (x.head.T if head_layout == "vd" else x.head) * logit_scale
        if x.bias is not None:
            z = z + x.bias[None, :]
        if softcap is not None:
            z = softcap * jnp.tanh(z / softcap)
        z = z.astype(jnp.float32)
        live = x.labels >= 0
        one_hot = jax.nn.one_hot(x.labels, z.shape[1])
        p = (1 - label_smoothing) * one_hot + label_smoothing / z.shape[1]
        lse = jax.nn.logsumexp(z, axis=1)
        losses = lse - jnp.sum(p * z, axis=1) + z_loss * lse**2
        w = live.astype(jnp.float32) * (1.0 if x.weights is None else x.weights)
        total = w * losses
        if reduction == "none":
            return total
        return total.sum() / w.sum() if reduction == "mean" else total.sum()

    return result(loss, given, reduction)


def truth(
    given: Inputs,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    head_layout: str = "vd",
) -> Result:
    """The equation and its derivatives in numpy float64."""
    e, c = given.hidden.astype(np.float64), given.head.astype(np.float64)
    c = c if head_layout == "vd" else c.T
    (n, v), beta, y = (len(e), len(c)), label_smoothing, given.labels
    live = y >= 0
    one_hot = y[:, None] == np.arange(v)

    z = logit_scale * e @ c.T
    if given.bias is not None:
        z = z + given.bias.astype(np.float64)
    slope = np.ones_like(z)
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    lse = logsumexp(z, axis=1)
    log_p = z - lse[:, None]
    p = np.exp(log_p)
    target, mean = z[np.arange(n), np.maximum(y, 0)], z.mean(axis=1)
    losses = np.where(live, lse - (1 - beta) * target - beta * mean + z_loss * lse**2, 0)

    w = np.where(live, 1.0 if given.weights is None else given.weights, 0.0)
    if reduction == "none":
        value, over_w = w * losses, cotangent(n) * losses
        g = cotangent(n) * w
    elif reduction == "sum":
        value, over_w, g = w @ losses, losses, w
    else:
        value = w @ losses / w.sum()
        over_w, g = np.where(live, losses - value, 0) / w.sum(), w / w.sum()

    du = g[:, None] * ((1 + 2 * z_loss * lse)[:, None] * p - (1 - beta) * one_hot - beta / v)
    du = du * slope
    d_head = logit_scale * du.T @ e
    grads = {
        "hidden": logit_scale * du @ c,
        "head": d_head if head_layout == "vd" else d_head.T,
        "bias": du.sum(axis=0),
        "weights": over_w,
    }
    prediction = z.argmax(axis=1)
    stats = lsce.TokenStats(
        loss=losses,
        lse=lse,
        target_logit=target,
        mean_logit=mean,
        confidence=p.max(axis=1),
        prediction=prediction,
        correct=prediction == y,
        entropy=-(p * log_p).sum(axis=1),
        sum_p_squared=(p**2).sum(axis=1),
        below_filter=np.zeros_like(lse),
    )
    return Result(
        value,
        {name: grads[name] for name in given.differentiable()},
        jax.tree.map(lambda x: np.where(live, x, 0), stats),
    )


def assert_no_worse(got: Result, this: Case, *, slack: float = 2.0) -> None:
    """Every value and gradient is as near to the truth as the naive loss's, up to a factor.

    Distances are norms of whole arrays, so that no zero divides, and of the head's gradient also
    over the classes that are nobody's label and over the others: the smoothing term is all that
    the former would miss.
    """
    _assert_near("value", got.value, this.truth.value, this.naive.value, slack)
    assert got.grads.keys() == this.truth.grads.keys()
    for name, true in this.truth.grads.items():
        assert got.grads[name].dtype == getattr(this.inputs, name).dtype, name
        _assert_near(name, got.grads[name], true, this.naive.grads[name], slack)
    axis = 0 if this.options.get("head_layout") != "dv" else 1
    heads = [x.grads["head"] for x in (got, this.truth, this.naive)]
    classes = np.arange(heads[0].shape[axis])
    hit = np.isin(classes, this.inputs.labels)
    for name, some in {"labels' head rows": classes[hit], "other head rows": classes[~hit]}.items():
        _assert_near(name, *(np.take(head, some, axis) for head in heads), slack)


def assert_stats(got: Result, this: Case, *, filtered: bool = False) -> None:
    """The statistics are float32 sums of exact logits, whatever the dtype of the inputs.

    How much lies below the filter is for the backend to say.
    """
    assert got.stats is not None
    assert this.truth.stats is not None
    stats = got.stats
    assert (stats.entropy >= 0).all()
    assert (stats.confidence <= 1).all()
    assert (stats.sum_p_squared <= 1).all()
    if filtered:
        assert ((stats.below_filter >= 0) & (stats.below_filter <= 1)).all()
        assert not stats.below_filter[this.inputs.labels.reshape(stats.loss.shape) < 0].any()
        stats = stats._replace(below_filter=np.zeros_like(stats.below_filter))
    for name, values, true in zip(lsce.TokenStats._fields, stats, this.truth.stats, strict=True):
        if values.dtype == np.float32:
            np.testing.assert_allclose(values, true, rtol=2e-5, atol=2e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(values, true, err_msg=name)


def _assert_near(
    name: str, got: np.ndarray, true: np.ndarray, naive: np.ndarray, slack: float
) -> None:
    size = np.linalg.norm(true)
    error = np.linalg.norm(got.astype(np.float64) - true)
    yardstick = np.linalg.norm(naive.astype(np.float64) - true)
    assert yardstick <= 0.1 * size, f"{name}: the naive loss is too far off to compare with"
    rounding = 4 * float(jnp.finfo(got.dtype).eps) * size  # where the naive loss was lucky
    assert error <= slack * yardstick + rounding, f"{name}: {error=} {yardstick=} {size=}"
