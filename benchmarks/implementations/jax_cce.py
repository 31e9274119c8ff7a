"""jax-cce: the logits in vocabulary chunks of an XLA scan."""

import functools
import importlib
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings


def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    jax_cce = importlib.import_module("jax_cce")
    return jax_cce.linear_cross_entropy(hidden, head, labels)


IMPLEMENTATION = Implementation(
    "jax-cce", "jax", loss, functools.partial(unsupported, supported=("exact",)), ("jax-cce",)
)
