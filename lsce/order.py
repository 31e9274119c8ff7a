"""The order of the vocabulary by activity: a hint with which a backend groups active classes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer


def vocabulary_order(
    activity: Integer[Array, " V"] | Float[Array, " V"],
) -> Int[Array, " V"]:
    """The permutation that sorts the classes by falling activity, int32 [V]; ties keep their order.

    `activity` is how often each token occurs in the data (`jnp.bincount(tokens, length=V)`) or its
    mean logit over some tokens (`head @ hidden.mean(0)`). Pass the result to
    `lsce.linear_cross_entropy(..., vocab_order=...)`; it may change the speed, and no exact result.
    Raises ValueError unless `activity` has one axis.
    """
    activity = jnp.asarray(activity)
    if activity.ndim != 1:
        raise ValueError(f"activity has shape {activity.shape}; must be [V], one number a class")
    return jnp.argsort(activity, descending=True, stable=True).astype(jnp.int32)
