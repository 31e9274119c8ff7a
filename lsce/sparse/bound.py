"""What bounds a token's log-sum-exp from below before the forward: the columns of frequent labels,
and, where nothing stands out, the mean logit."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def most_frequent(
    labels: Int[Array, " rows"], v: int, most: int
) -> tuple[Int[Array, " most"], Int[Array, ""]]:
    """The `most` labels that occur most often, 0 after the last, and how many they are."""
    # One integer to sort by: first the count, up to what has room beside the label, then the label.
    room = v.bit_length()
    top = (1 << 32 - room) - 1
    safe = jnp.maximum(labels, 0)
    count = jnp.zeros(v, jnp.uint32).at[safe].add(jnp.uint32(1))[safe]
    key = (jnp.uint32(top) - jnp.minimum(count, jnp.uint32(top))) << room
    key = jnp.where(labels >= 0, key | safe.astype(jnp.uint32), jnp.uint32(0xFFFFFFFF))
    key = jnp.sort(key)
    fresh = jnp.diff(key, prepend=~key[:1]) != 0
    fresh &= key != jnp.uint32(0xFFFFFFFF)
    rank = jnp.cumsum(fresh, dtype=jnp.int32) - 1
    place = jnp.where(fresh, rank, most + jnp.arange(key.shape[0]))
    label = (key & jnp.uint32((1 << room) - 1)).astype(jnp.int32)
    ids = jnp.zeros(most, jnp.int32).at[place].set(label, mode="drop", unique_indices=True)
    # Not `fresh.sum()`, with which XLA would make one multiprocessor do the running sums as well.
    return ids, jnp.minimum(rank[-1] + 1, most)


def of_mean_logit(mean: Float[Array, " N"], v: int) -> Float[Array, " N"]:
    """ln V + the mean of V logits: no log-sum-exp is less, and that of equal logits is no more."""
    return math.log(v) + mean
