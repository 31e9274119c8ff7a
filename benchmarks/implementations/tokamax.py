"""tokamax: its chunked XLA loss, the one it has for GPUs and CPUs."""

import functools
import importlib
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings


def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    tokamax = importlib.import_module("tokamax")
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, head.T, reduction="mean", implementation="chunked_xla"
    )


IMPLEMENTATION = Implementation(
    "tokamax", "jax", loss, functools.partial(unsupported, supported=("exact",)), ("tokamax",)
)
