"""The loss in PyTorch: eager, compiled, and the peers."""

import functools
from typing import Any

import torch
from torch.nn import functional

from benchmarks.peers import cut_cross_entropy, liger
from benchmarks.settings import Implementation, Settings, unsupported


def eager(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    """cross_entropy on float32 logits from a product in the inputs' dtype."""
    z = (hidden @ head.T).float()
    if settings.softcap is not None:
        z = settings.softcap * torch.tanh(z / settings.softcap)
    return functional.cross_entropy(z, labels, label_smoothing=settings.label_smoothing)


_refuses = functools.partial(unsupported, supported=("smoothing", "softcap", "exact"))

LOSSES = {
    implementation.name: implementation
    for implementation in (
        Implementation("torch-eager", eager, _refuses),
        Implementation("torch-compile", torch.compile(eager, dynamic=False), _refuses),
        cut_cross_entropy.IMPLEMENTATION,
        liger.IMPLEMENTATION,
    )
}
