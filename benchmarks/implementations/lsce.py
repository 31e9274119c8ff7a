"""The loss in JAX: this library's backends, what users write today, and the peers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import lsce
from benchmarks.peers import jax_cce, tokamax
from benchmarks.settings import Implementation, Settings, unsupported
from lsce import backends


def logits(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], settings: Settings
) -> Float[Array, "N V"]:
    """float32 logits from a product in the inputs' dtype, as most training code makes them."""
    z = (hidden @ head.T).astype(jnp.float32)
    cap = settings.softcap
    return z if cap is None else cap * jnp.tanh(z / cap)


def naive(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " N"],
    order: None,
    settings: Settings,
) -> Float[Array, ""]:
    """optax on logits and smoothed one-hot labels."""
    targets = jax.nn.one_hot(labels, head.shape[0])
    if settings.label_smoothing:
        targets = optax.smooth_labels(targets, settings.label_smoothing)
    return optax.softmax_cross_entropy(logits(hidden, head, settings), targets).mean()


def naive_integer(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " N"],
    order: None,
    settings: Settings,
) -> Float[Array, ""]:
    """optax on logits and integer labels."""
    z = logits(hidden, head, settings)
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


def ours(name: str) -> Implementation:
    """One of this library's backends, or "auto"."""

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

    return Implementation(name, loss, lambda settings: None, backend=backend)


LOSSES = {
    implementation.name: implementation
    for implementation in (
        *map(ours, ("auto", *backends.MODULES)),
        Implementation(
            "naive",
            naive,
            functools.partial(unsupported, supported=("smoothing", "softcap", "exact")),
            package="optax",
        ),
        Implementation(
            "naive-integer",
            naive_integer,
            functools.partial(unsupported, supported=("softcap", "exact")),
            package="optax",
        ),
        jax_cce.IMPLEMENTATION,
        tokamax.IMPLEMENTATION,
    )
}
