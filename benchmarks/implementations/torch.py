"""What users of PyTorch write today: cross_entropy on materialised logits, eager and compiled."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings


@functools.cache
def cross_entropy() -> Callable[..., Any]:
    """cross_entropy on float32 logits from a product in the inputs' dtype."""
    torch = importlib.import_module("torch")

    def loss(hidden: Any, head: Any, labels: Any, settings: Settings) -> Any:
        z = (hidden @ head.T).float()
        if settings.softcap is not None:
            z = settings.softcap * torch.tanh(z / settings.softcap)
        smoothing = settings.label_smoothing
        return torch.nn.functional.cross_entropy(z, labels, label_smoothing=smoothing)

    return loss


@functools.cache
def compiled_cross_entropy() -> Callable[..., Any]:
    """The same by torch.compile."""
    return importlib.import_module("torch").compile(cross_entropy(), dynamic=False)


def eager(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    return cross_entropy()(hidden, head, labels, settings)


def compiled(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    return compiled_cross_entropy()(hidden, head, labels, settings)


_refuses = functools.partial(unsupported, supported=("smoothing", "softcap", "exact"))
EAGER = Implementation("torch-eager", "torch", eager, _refuses)
COMPILED = Implementation("torch-compile", "torch", compiled, _refuses)
