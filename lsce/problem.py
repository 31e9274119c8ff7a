"""What a backend is asked to do, known before it compiles, and every refusal of a user's call."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lsce.arguments import boolean, integer, number

HeadLayout = Literal["vd", "dv"]
Reduction = Literal["mean", "sum", "none"]
GradientFilter = float | None | Literal["auto", "fused", "hidden", "fp8"]
Precision = Literal["fp8"]
INT32 = np.iinfo(np.int32)
SMALLEST_WEIGHT = float(np.finfo(np.float32).smallest_normal)
LARGEST_WEIGHT = float(np.finfo(np.float32).max)
LARGEST = 1e30
"""The largest value of an option: its inverse, too, is a float32 that nothing flushes to 0."""


def cdiv(a: Any, b: Any) -> Any:
    """a / b of integers or arrays of them, rounded up."""
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of the loss as a hashable value.

    N tokens, D hidden size, V vocabulary. `platform` and `chip` describe the device the call will
    run on: jax's platform name ("cpu", "gpu", "tpu") and device kind ("NVIDIA H100 80GB HBM3").
    The options are those of `lsce.linear_cross_entropy`; an impossible one raises ValueError here.
    """

    n: int
    d: int
    v: int
    hidden_dtype: np.dtype
    head_dtype: np.dtype
    platform: str
    chip: str
    head_layout: HeadLayout = "vd"
    has_bias: bool = False
    has_vocab_order: bool = False
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    gradient_filter: GradientFilter = "auto"
    precision: Precision | None = None
    return_stats: bool = False
    examples: int = 1
    """Equally long calls that `vmap` has made this one of; the tokens of each lie together."""

    def __post_init__(self):
        if self.v < 1 or self.d < 1:
            raise ValueError(f"an empty head: V={self.v} classes of hidden size D={self.d}")
        if self.v >= 2**31 - 1:
            raise ValueError(f"V={self.v} classes; class indices are int32, so V must be < 2³¹ − 1")
        if self.head_layout not in get_args(HeadLayout):
            raise ValueError(f"head_layout={self.head_layout!r}; must be 'vd' or 'dv'")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing}; must lie in [0, 1]")
        if not 0.0 < self.logit_scale <= LARGEST:
            raise ValueError(f"logit_scale={self.logit_scale}; must be in (0, {LARGEST:g}]")
        if self.softcap is not None and not 0.0 < self.softcap <= LARGEST:
            raise ValueError(f"softcap={self.softcap}; must be in (0, {LARGEST:g}], or None")
        if not 0.0 <= self.z_loss <= LARGEST:
            raise ValueError(f"z_loss={self.z_loss}; must be in [0, {LARGEST:g}]")
        self._check_gradient_filter()
        if self.precision is not None and self.precision not in get_args(Precision):
            raise ValueError(
                f"precision={self.precision!r}; must be None (as the dtypes say) or 'fp8'"
            )

    def _check_gradient_filter(self):
        choice = self.gradient_filter
        known = choice is None or choice in get_args(get_args(GradientFilter)[-1])
        if not known and not (isinstance(choice, float) and 0.0 <= choice < 1.0):
            raise ValueError(
                f"gradient_filter={choice!r}; must be 'auto', 'fused', 'hidden', 'fp8', None "
                "(exact), or the largest probability that may be dropped, in [0, 1)"
            )


def of_call(
    hidden: Any,
    head: Any,
    labels: Any,
    *,
    weights: Any,
    bias: Any,
    vocab_order: Any,
    ignore_index: int,
    reduction: str,
    device: Any,
    **options: Any,
) -> Problem:
    """The problem of one call, of which only shapes, dtypes and Python values are read.

    Raises TypeError or ValueError for what `lsce.linear_cross_entropy` cannot take.
    """
    for name, x in {"hidden": hidden, "head": head, "bias": bias}.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {x.dtype}; must be a float dtype")
    require_integers(labels)
    for name, x in {"hidden": hidden, "head": head}.items():
        if not all(isinstance(size, int) for size in x.shape):
            raise ValueError(
                f"{name} has the symbolic shape ({', '.join(map(str, x.shape))}); the loss is cut "
                "into tiles of known sizes, so export it for a fixed number of tokens"
            )
    if hidden.ndim < 1 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden {hidden.shape} and labels {labels.shape}; "
            "must be [..., D] and [...] with the same leading axes"
        )
    layout = options["head_layout"]
    if head.ndim != 2:
        raise ValueError(f"head has shape {head.shape}; must be [V, D], or [D, V] with 'dv'")
    v, d = head.shape if layout != "dv" else head.shape[::-1]
    if d != hidden.shape[-1]:
        hint = f"; is head_layout={layout!r} right?" if hidden.shape[-1] in head.shape else ""
        raise ValueError(
            f"hidden {hidden.shape} has D={hidden.shape[-1]}, "
            f"head {head.shape} in layout {layout!r} has D={d}{hint}"
        )
    if bias is not None and bias.shape != (v,):
        raise ValueError(f"bias has shape {bias.shape}; must be [V] = ({v},)")
    if weights is not None:
        if not jnp.issubdtype(weights.dtype, jnp.floating) and weights.dtype != jnp.bool_:
            raise TypeError(f"weights have dtype {weights.dtype}; must be float or bool")
        if weights.shape != labels.shape:
            raise ValueError(
                f"weights {weights.shape} must have the shape of labels {labels.shape}"
            )
    if vocab_order is not None:
        if not jnp.issubdtype(vocab_order.dtype, jnp.integer):
            raise TypeError(f"vocab_order has dtype {vocab_order.dtype}; must be int32")
        if vocab_order.shape != (v,):
            raise ValueError(f"vocab_order has shape {vocab_order.shape}; must be [V] = ({v},)")

    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction={reduction!r}; must be 'mean', 'sum' or 'none'")
    if options["gradient_filter"] == "fused" and reduction == "none":
        raise ValueError(
            "gradient_filter='fused' makes the gradients before it knows a token's cotangent: "
            "reduction='none' needs another filter, or take 'sum' or 'mean'"
        )
    boolean("return_stats", options["return_stats"])
    ignore_index = integer("ignore_index", ignore_index)
    if not INT32.min < ignore_index < INT32.max:
        raise ValueError(f"ignore_index={ignore_index}; must lie strictly inside int32")
    for name in ("label_smoothing", "logit_scale", "z_loss"):
        options[name] = number(name, options[name])
    if options["softcap"] is not None:
        options["softcap"] = number("softcap", options["softcap"])
    epsilon = options["gradient_filter"]
    if epsilon is not None and not isinstance(epsilon, str):
        options["gradient_filter"] = number("gradient_filter", epsilon)

    return Problem(
        n=labels.size,
        d=d,
        v=v,
        hidden_dtype=np.dtype(hidden.dtype),
        head_dtype=np.dtype(head.dtype),
        platform=device.platform,
        chip=device.device_kind,
        has_bias=bias is not None,
        has_vocab_order=vocab_order is not None,
        **options,
    )


def require_float32(weights: Any) -> None:
    """ValueError for weights on the host that float32 would turn into 0 or ∞."""
    if weights is None or isinstance(weights, jax.Array | jax.ShapeDtypeStruct):
        return
    given = np.asarray(weights)
    if not np.issubdtype(given.dtype, np.floating):
        return
    size = np.abs(given)
    beyond = (size > 0.0) & (size < SMALLEST_WEIGHT) | (size > LARGEST_WEIGHT) & np.isfinite(size)
    if beyond.any():
        raise ValueError(
            f"weights hold {given[beyond].flat[0]}, which float32 does not; scale them, for "
            "example so that the largest is 1"
        )


def require_permutation(vocab_order: Any) -> None:
    """ValueError for an order on the host that leaves out a class, whose gradient would be lost."""
    if vocab_order is None or isinstance(vocab_order, jax.Array | jax.ShapeDtypeStruct):
        return
    missing = np.setdiff1d(np.arange(len(vocab_order)), vocab_order)
    if missing.size:
        raise ValueError(
            f"vocab_order leaves out {missing.size} of {len(vocab_order)} classes, the first of "
            f"them {missing[0]}; must be a permutation of all (lsce.vocabulary_order makes one)"
        )


def require_integers(labels: Any) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}; must be integers, one class a token")
