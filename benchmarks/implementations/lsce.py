"""This library: each of its backends, and "auto"."""

from typing import Any

import lsce
from benchmarks.implementations.implementation import Implementation
from benchmarks.implementations.settings import Settings
from lsce import backends


def of_backend(name: str) -> Implementation:
    """One of the backends, or "auto"."""

    def options(settings: Settings) -> dict[str, Any]:
        return {
            "label_smoothing": settings.label_smoothing,
            "softcap": settings.softcap,
            "gradient_filter": settings.gradient_filter,
            "return_stats": settings.stats,
            "implementation": name,
        }

    def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
        return lsce.linear_cross_entropy(
            hidden, head, labels, vocab_order=order, **options(settings)
        )

    def backend(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> str:
        call = lsce.explain(hidden, head, labels, vocab_order=order, **options(settings))
        return call.implementation

    return Implementation(name, "jax", loss, lambda settings: None, backend=backend)


BACKENDS = tuple(map(of_backend, ("auto", *backends.MODULES)))
