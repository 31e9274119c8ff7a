"""Which columns of the vocabulary each block of tokens needs, and the order that joins them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, UInt

from lsce.problem import cdiv
from lsce.sparse.tokens import BLOCK


class Columns(NamedTuple):
    """The vocabulary in the order in which the backward visits it."""

    order: Int[Array, " V"]
    """Column ids, the active ones first."""
    position: Int[Array, " V"]
    """Where a column stands in `order`."""


def with_labels(
    bits: UInt[Array, "groups V"], labels: Int[Array, " rows"], keep_all: Bool[Array, " blocks"]
) -> UInt[Array, "groups V"]:
    """Adds each token's label (−1: none) to its block, and every column to some blocks."""
    groups = bits.shape[0]
    keep_all = jnp.pad(keep_all, (0, groups * 32 - keep_all.shape[0])).reshape(groups, 32)
    shift = jnp.arange(32, dtype=jnp.uint32)
    bits |= jnp.where(keep_all, jnp.uint32(1) << shift[None, :], 0).sum(1, dtype=jnp.uint32)[
        :, None
    ]
    # A label counts once a block, and not where the forward marked it: then adding is or-ing.
    y = jnp.sort(labels.reshape(-1, BLOCK), axis=1)
    block = jnp.arange(y.shape[0])[:, None]
    fresh = (y != jnp.pad(y, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]) & (y >= 0)
    bit = jnp.uint32(1) << (block % 32).astype(jnp.uint32)
    fresh &= (bits[block // 32, y] & bit) == 0
    return bits.at[block // 32, y].add(jnp.where(fresh, bit, jnp.uint32(0)))


def order_columns(
    bits: UInt[Array, "groups V"],
    vocab_order: Int[Array, " V"] | None,
    blocks: int,
    tile_c: int,
) -> tuple[Columns, Bool[Array, "T B"]]:
    """Brings the active columns together and says which (tile, block) pairs they make active.

    Without a `vocab_order` the most shared columns come first. Among columns shared by about as
    many blocks (a factor of two) those that are active in the same sixteenths of the blocks are
    neighbours, so that they share their tiles. On Gemma 3 270M's activations this makes a seventh
    fewer active tiles than the count alone, and less than half of those of the vocabulary's own
    order (benchmarks/NOTES.md). A given `vocab_order` is taken instead, as the order of the active
    columns.
    """
    groups, v = bits.shape
    count = lax.population_count(bits).sum(0, dtype=jnp.uint32)
    if vocab_order is None and blocks <= 16:
        key = jnp.asarray(_sharing_ranks(blocks))[bits[0]]
    elif vocab_order is None:
        key = jnp.where(count == 0, jnp.uint32(0xFFFFFFFF), _sharing_key(bits, count, blocks))
    else:
        rank = jnp.arange(v, dtype=jnp.uint32)
        key = jnp.zeros(v, jnp.uint32).at[vocab_order].set(rank, unique_indices=True)
        key = jnp.where(count == 0, jnp.uint32(0xFFFFFFFF), key)
    order = lax.sort((key, jnp.arange(v, dtype=jnp.int32)), num_keys=1)[1]
    position = jnp.zeros(v, jnp.int32).at[order].set(jnp.arange(v, dtype=jnp.int32))
    tiles = cdiv(v, tile_c)
    sorted_bits = jnp.pad(bits[:, order], ((0, 0), (0, tiles * tile_c - v)))
    tile_bits = lax.reduce(
        sorted_bits.reshape(groups, tiles, tile_c), jnp.uint32(0), lax.bitwise_or, (2,)
    )
    pairs = (tile_bits[..., None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    pairs = pairs.astype(jnp.bool_).transpose(1, 0, 2).reshape(tiles, groups * 32)
    return Columns(order, position), pairs[:, :blocks]


@functools.cache
def _sharing_ranks(blocks: int) -> np.ndarray:
    """`_sharing_key`'s order of all sets of at most 16 blocks, the empty one last: [2^blocks].

    16 bits sort in half the time, which is a thirtieth of a call with 2,048 tokens.
    """
    sets = np.arange(2**blocks, dtype=np.uint32)
    members = (sets[:, None] >> np.arange(blocks, dtype=np.uint32)) & 1
    parts = np.zeros(len(sets), np.uint32)
    for block in range(blocks):
        parts |= members[:, block] << np.uint32(15 - block * 16 // blocks)
    for shift in (8, 4, 2, 1):
        parts ^= parts >> np.uint32(shift)
    # The more blocks the earlier, by powers of two.
    size = np.floor(np.log2(np.maximum(members.sum(1), 1))).astype(int)
    order = np.lexsort((parts, -size, sets == 0))
    ranks = np.zeros(len(sets), np.uint16)
    ranks[order] = np.arange(len(sets))
    return ranks


def _sharing_key(
    bits: UInt[Array, "groups V"], count: UInt[Array, " V"], blocks: int
) -> UInt[Array, " V"]:
    # The sixteenths of the blocks in which a column is active, as a number whose neighbours differ
    # in one of them (its place in the Gray code).
    block = np.arange(blocks)
    part = np.zeros((16, bits.shape[0]), np.uint32)
    np.bitwise_or.at(
        part, (block * 16 // blocks, block // 32), np.uint32(1) << (block % 32).astype(np.uint32)
    )
    active = jnp.any((bits[None] & part[..., None]) != 0, axis=1)
    place = np.uint32(1) << np.arange(15, -1, -1, dtype=np.uint32)
    parts = jnp.where(active, place[:, None], jnp.uint32(0)).sum(0, dtype=jnp.uint32)
    for shift in (8, 4, 2, 1):
        parts ^= parts >> shift
    offset = 32 * jnp.arange(bits.shape[0], dtype=jnp.uint32)[:, None]
    trailing = lax.population_count(~bits & (bits - 1))
    first = jnp.where(bits == 0, jnp.uint32(2047), trailing + offset).min(0)
    # The number of leading zeros is the bucket of the count; it takes 5 bits.
    return (lax.clz(count) << 27) | (parts << 11) | jnp.minimum(first, jnp.uint32(2047))
