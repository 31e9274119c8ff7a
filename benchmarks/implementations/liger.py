"""Liger: chunks of tokens, gradients made in the forward, by its Triton kernels.

Its newer paths for Hopper (CuTe DSL) are not measured.
"""

import functools
import importlib
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings


def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module("liger_kernel.transformers")
    module = library.LigerFusedLinearCrossEntropyLoss(
        label_smoothing=settings.label_smoothing, softcap=settings.softcap
    )
    return module(head, hidden, labels)


IMPLEMENTATION = Implementation(
    "liger",
    "torch",
    loss,
    functools.partial(unsupported, supported=("smoothing", "softcap", "exact")),
    package="liger-kernel",
)
