"""What a backend is asked to do: the shapes, dtypes and options of one call, known before compilation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

HeadLayout = Literal["vd", "dv"]
GradientFilter = float | None | Literal["auto", "fused"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of the loss as a hashable value.

    N tokens, D hidden size, V vocabulary. `platform` and `chip` describe the device the call will
    run on: jax's platform name ("cpu", "gpu", "tpu") and device kind ("NVIDIA H100 80GB HBM3").
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
