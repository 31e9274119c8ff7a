"""Apple's cut-cross-entropy: Triton kernels that skip blocks of the gradient below 2^-12."""

import importlib
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings


def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module("cut_cross_entropy")
    options: dict[str, Any] = {"softcap": settings.softcap}
    if settings.gradient_filter != "auto":
        options["filter_eps"] = settings.gradient_filter
    return library.linear_cross_entropy(hidden, head, labels, **options)


def refuses(settings: Settings) -> str | None:
    chosen = settings.gradient_filter
    if isinstance(chosen, str) and chosen != "auto":
        return f"has no gradient filter {chosen!r}"
    return unsupported(settings, ("softcap", "filter"))


IMPLEMENTATION = Implementation(
    "cut-cross-entropy",
    "torch",
    loss,
    refuses,
    ("cut-cross-entropy",),
    heeded=lambda settings, backend: settings,
)
