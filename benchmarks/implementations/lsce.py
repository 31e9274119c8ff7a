"""This library: each of its backends, and "auto"."""

import dataclasses
from typing import Any

import lsce
from benchmarks.implementations.implementation import Implementation
from benchmarks.implementations.settings import Settings
from lsce import backends

EXACT = ("chunked", "reference")
"""Backends that filter nothing and follow no order of the vocabulary."""


def of_backend(name: str) -> Implementation:
    """One of the backends, or "auto"."""

    def options(settings: Settings) -> dict[str, Any]:
        return {
            "label_smoothing": settings.label_smoothing,
            "softcap": settings.softcap,
            "gradient_filter": settings.gradient_filter,
            "return_stats": settings.stats,
            "precision": settings.precision,
            "implementation": name,
        }

    def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
        return lsce.linear_cross_entropy(
            hidden, head, labels, vocab_order=order, **options(settings)
        )

    def backend(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> str:
        call = lsce.explain(hidden, head, labels, vocab_order=order, **options(settings))
        return call.implementation

    return Implementation(name, "jax", loss, lambda settings: None, backend=backend, heeded=heeded)


def heeded(settings: Settings, backend: str) -> Settings:
    """What the backend makes use of."""
    if backend not in EXACT:
        return settings
    return dataclasses.replace(settings, gradient_filter="auto", vocab_order=False, precision=None)


BACKENDS = tuple(map(of_backend, ("auto", *backends.MODULES)))
