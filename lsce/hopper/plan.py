"""Which tiles the backward computes: from the forward's marks to lists that the kernels walk.

The columns that some block of tokens needs are brought together (a permutation of the vocabulary),
so that the work is a list of (column tile, token block) pairs, known on the device only. Nothing
here has a capacity that could overflow: every list is as long as if all tiles were active.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt

from lsce.hopper import marks

BLOCK = 128
"""Tokens a block: the rows of one backward tile."""


class Lists(NamedTuple):
    """The active tiles of every chunk of columns; chunk = `width` columns, T tiles, B blocks."""

    tiles: Int[Array, "chunks TB"]
    """Active pairs as t·B + b, in that order, the active ones first."""
    tile_count: Int[Array, " chunks"]
    of_block: Int[Array, "chunks B T"]
    """For each block its active column tiles first."""
    of_block_count: Int[Array, "chunks B"]
    of_tile: Int[Array, "chunks T B"]
    """For each column tile its active blocks first."""
    of_tile_count: Int[Array, "chunks T"]


class Columns(NamedTuple):
    """The vocabulary in the order in which the backward visits it."""

    order: Int[Array, " padded"]
    """Column ids, the active ones first; padding holds V."""
    position: Int[Array, " V"]
    """Where a column stands in `order`."""
    chunks: Int[Array, ""]
    """How many chunks hold an active column."""


def lists(active: Bool[Array, "chunks T B"]) -> Lists:
    """The lists of the active tiles, in a fixed order."""
    chunks = active.shape[0]
    first = lambda x: jnp.argsort(~x, axis=-1, stable=True).astype(jnp.int32)
    count = lambda x: x.sum(-1, dtype=jnp.int32)
    flat = active.reshape(chunks, -1)
    by_block = active.transpose(0, 2, 1)
    return Lists(
        first(flat), count(flat), first(by_block), count(by_block), first(active), count(active)
    )


def dense(blocks: int, live_blocks: Int[Array, ""], tiles: int) -> Lists:
    """Every tile of every live block: one chunk that serves for all."""
    return lists(jnp.broadcast_to(jnp.arange(blocks) < live_blocks, (1, tiles, blocks)))


def column_bits(
    words: Int[Array, "mark_blocks 4 words"], rows_per_mark: int, v: int
) -> UInt[Array, "groups V"]:
    """For every column one bit a token block, 32 blocks a word."""
    merge = BLOCK // rows_per_mark
    joined = lax.bitcast_convert_type(words, jnp.uint32)
    joined = joined.reshape(-1, merge * 4, joined.shape[-1])
    joined = lax.reduce(joined, jnp.uint32(0), lax.bitwise_or, (1,))
    # Without the barrier XLA would redo the reduction for each of the 32 bits of a word.
    joined = lax.optimization_barrier(joined)
    blocks, total = joined.shape
    groups = -(-blocks // 32)
    joined = jnp.pad(joined, ((0, groups * 32 - blocks), (0, 0)))
    joined = joined.reshape(groups, 32, total // 4, 1, 4, 1)
    here = (joined >> marks.BIT) & jnp.uint32(1)
    place = jnp.arange(32, dtype=jnp.uint32).reshape(1, 32, 1, 1, 1, 1)
    return (here << place).sum(1, dtype=jnp.uint32).reshape(groups, total * 32)[:, :v]


def with_labels(
    bits: UInt[Array, "groups V"], labels: Int[Array, " rows"], whole: Bool[Array, " blocks"]
) -> UInt[Array, "groups V"]:
    """Adds every token's label (−1: none) to its block, and every column to the `whole` blocks."""
    groups = bits.shape[0]
    whole = jnp.pad(whole, (0, groups * 32 - whole.shape[0])).reshape(groups, 32)
    place = jnp.arange(32, dtype=jnp.uint32)
    bits |= jnp.where(whole, jnp.uint32(1) << place, 0).sum(1, dtype=jnp.uint32)[:, None]
    # A label counts once a block, and not where the forward marked it: then adding is or-ing.
    y = jnp.sort(labels.reshape(-1, BLOCK), axis=1)
    block = jnp.arange(y.shape[0])[:, None]
    fresh = (y != jnp.pad(y, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]) & (y >= 0)
    bit = jnp.uint32(1) << (block % 32).astype(jnp.uint32)
    fresh &= (bits[block // 32, y] & bit) == 0
    return bits.at[block // 32, y].add(jnp.where(fresh, bit, jnp.uint32(0)))


def columns(
    bits: UInt[Array, "groups V"], blocks: int, width: int, tile_c: int
) -> tuple[Columns, Bool[Array, "chunks T B"]]:
    """Brings the active columns together and says which (tile, block) pairs they make active.

    The most shared columns come first: their tiles are full. The rest is ordered by its first
    block, so that columns which one block alone needs share a tile.
    """
    groups, v = bits.shape
    count = lax.population_count(bits).sum(0, dtype=jnp.uint32)
    lowest = jnp.where(bits == 0, 32, lax.clz(bits & -bits) ^ 31)  # trailing zeros
    offset = 32 * jnp.arange(groups, dtype=jnp.uint32)[:, None]
    first = jnp.where(bits == 0, jnp.uint32(32 * groups), lowest.astype(jnp.uint32) + offset).min(0)
    key = ((32 * groups - count) << 16) | first
    order = lax.sort((key, jnp.arange(v, dtype=jnp.int32)), num_keys=1)[1]
    position = jnp.zeros(v, jnp.int32).at[order].set(jnp.arange(v, dtype=jnp.int32))
    active = (count > 0).sum(dtype=jnp.int32)
    padded = -(-v // width) * width
    sorted_bits = jnp.pad(bits[:, order], ((0, 0), (0, padded - v)))
    tile_bits = lax.reduce(
        sorted_bits.reshape(groups, -1, width // tile_c, tile_c),
        jnp.uint32(0), lax.bitwise_or, (3,),
    )
    place = jnp.arange(32, dtype=jnp.uint32)
    pairs = ((tile_bits[..., None] >> place) & 1).astype(jnp.bool_)  # groups, chunks, T, 32
    pairs = pairs.transpose(1, 2, 0, 3).reshape(*tile_bits.shape[1:], groups * 32)[..., :blocks]
    order = jnp.pad(order, (0, padded - v), constant_values=v)
    return Columns(order, position, (active + width - 1) // width), pairs
