"""Tokens in rows: those with a loss first, and neighbours that need the same columns."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsce.problem import cdiv

BLOCK = 128
"""Tokens a block: the rows of one tile of the backward."""


class Rows(NamedTuple):
    """The tokens with a loss first, padded with zeros to whole groups of blocks.

    Blocks of tokens without a loss are never visited, and a NaN in their hidden state goes nowhere.
    """

    hidden: Float[Array, "rows D"]
    labels: Int[Array, " rows"]
    in_use: Bool[Array, " rows"]
    row_of_token: Int[Array, " N"]
    live: Int[Array, ""]


def order_tokens(
    labels: Int[Array, " N"],
    entropy: Float[Array, " N"] | None = None,
    prediction: Int[Array, " N"] | None = None,
) -> Int[Array, " N"]:
    """The row that each token gets: those with a loss first.

    With what is known of their entropy and their likeliest class, tokens that spread their
    probability about as widely (by nats of entropy) and have the same class on top become
    neighbours, so that a block of them needs fewer columns, and the columns of the widest are not
    every block's. Active pairs of Gemma 3 270M's activations: −16%, of SmolLM2 135M's: −23%
    (benchmarks/NOTES.md).
    """
    has_loss = labels >= 0
    index = jnp.arange(labels.shape[0], dtype=jnp.int32)
    if entropy is None or prediction is None:
        before = jnp.cumsum(has_loss, dtype=jnp.int32)
        return jnp.where(has_loss, before - 1, before[-1:] + index - before)
    width = jnp.where(entropy < 15.0, entropy, 15.0).astype(jnp.uint32)  # NaN too
    key = (width << 27) | prediction.astype(jnp.uint32)
    key = jnp.where(has_loss, key, jnp.uint32(0xFFFFFFFF))
    order = lax.sort((key, index), num_keys=1)[1]
    return jnp.zeros_like(index).at[order].set(index, unique_indices=True)


def arrange(
    hidden: Float[Array, "N D"], labels: Int[Array, " N"], row_of_token: Int[Array, " N"], unit: int
) -> Rows:
    """The tokens in their rows, which are a multiple of `unit`."""
    n = labels.shape[0]
    rows = cdiv(n, unit) * unit
    live = (labels >= 0).sum(dtype=jnp.int32)
    index = jnp.arange(n, dtype=jnp.int32)
    at = jnp.full(rows, n, jnp.int32).at[row_of_token].set(index, unique_indices=True)
    in_use = jnp.arange(rows) < live
    hidden = jnp.where(in_use[:, None], hidden.at[at].get(mode="fill", fill_value=0), 0)
    labels = jnp.where(in_use, labels.at[at].get(mode="fill", fill_value=-1), -1)
    return Rows(hidden, labels, in_use, row_of_token, live)
