"""What users of JAX write today: optax on materialised logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings


def logits(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], settings: Settings
) -> Float[Array, "N V"]:
    """float32 logits from a product in the inputs' dtype, as most training code makes them."""
    z = (hidden @ head.T).astype(jnp.float32)
    cap = settings.softcap
    return z if cap is None else cap * jnp.tanh(z / cap)


def one_hot(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " N"],
    order: Any,
    settings: Settings,
) -> Float[Array, ""]:
    """The loss on smoothed one-hot labels."""
    targets = jax.nn.one_hot(labels, head.shape[0])
    if settings.label_smoothing:
        targets = optax.smooth_labels(targets, settings.label_smoothing)
    return optax.softmax_cross_entropy(logits(hidden, head, settings), targets).mean()


def integer(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " N"],
    order: Any,
    settings: Settings,
) -> Float[Array, ""]:
    """The loss on integer labels."""
    z = logits(hidden, head, settings)
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


ONE_HOT = Implementation(
    "naive",
    "jax",
    one_hot,
    functools.partial(unsupported, supported=("smoothing", "softcap", "exact")),
    ("optax",),
)
INTEGER = Implementation(
    "naive-integer",
    "jax",
    integer,
    functools.partial(unsupported, supported=("softcap", "exact")),
    ("optax",),
)
