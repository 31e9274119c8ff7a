"""What a backend is asked to do: a call's shapes, dtypes and options, known before it compiles."""

import dataclasses
from typing import Literal, get_args

import numpy as np

HeadLayout = Literal["vd", "dv"]
GradientFilter = float | None | Literal["auto", "fused"]
LARGEST = 1e30
"""Of an option: its inverse, too, is a float32 that nothing flushes to 0."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
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
    return_stats: bool = False

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

    def _check_gradient_filter(self):
        choice = self.gradient_filter
        known = choice is None or choice in ("auto", "fused")
        if not known and not (isinstance(choice, float) and 0.0 <= choice < 1.0):
            raise ValueError(
                f"gradient_filter={choice!r}; must be 'auto', 'fused', None (exact), or the "
                "largest probability that may be dropped, in [0, 1)"
            )
