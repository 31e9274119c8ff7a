"""flash-linear-attention: chunks of tokens, gradients made in the forward, by Triton kernels.

By default it sums dC in float32, for which it copies a chunk's dz and hidden states to float32 and
multiplies there; `BFLOAT16` sums it in the head's own dtype.
"""

import functools
import importlib
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings


def _loss(
    hidden: Any, head: Any, labels: Any, order: Any, settings: Settings, *, float32: bool
) -> Any:
    library = importlib.import_module("fla.modules.fused_linear_cross_entropy")
    return library.fused_linear_cross_entropy_loss(
        hidden,
        labels,
        head,
        label_smoothing=settings.label_smoothing,
        logit_softcapping=settings.softcap,
        accumulate_grad_in_fp32=float32,
    )


_refuses = functools.partial(unsupported, supported=("smoothing", "softcap", "exact"))
FLOAT32, BFLOAT16 = (
    Implementation(
        name,
        "torch",
        functools.partial(_loss, float32=float32),
        _refuses,
        ("flash-linear-attention",),
    )
    for name, float32 in (("fla", True), ("fla-bfloat16", False))
)
