"""jax-cce: the logits in vocabulary chunks of an XLA scan."""

import functools
import importlib
from typing import Any

from benchmarks.settings import Implementation, Settings, unsupported


def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    jax_cce = importlib.import_module("jax_cce")
    return jax_cce.linear_cross_entropy(hidden, head, labels)


IMPLEMENTATION = Implementation(
    "jax-cce", loss, functools.partial(unsupported, supported=("exact",)), package="jax-cce"
)
