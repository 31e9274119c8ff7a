"""Which tiles the backward computes: from the forward's marks to lists that the kernels walk.

The columns that some block of tokens needs are brought together (a permutation of the vocabulary),
so that the work is a list of (column tile, token block) pairs, known on the device only. Nothing
here has a capacity that could overflow: every list is as long as if all tiles were active.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, UInt

from lsce.backends.hopper.kernels import marks
from lsce.backends.hopper.tiles import BLOCK


class Work(NamedTuple):
    """The active (column tile, token block) pairs of all chunks; T column tiles, B blocks.

    A chunk is a run of column tiles whose P fits the buffer of `slots` tiles. P of a pair lies in
    slot `tile_slot[t] + rank`, where rank is the block's place in `of_tile[t]`.
    """

    chunks: Int[Array, ""]
    """How many chunks there are."""
    first_tile: Int[Array, " chunks"]
    """Where each chunk begins; one more entry than chunks."""
    items: Int[Array, " items"]
    """Groups of `group` pairs of one column tile, as t·B + rank of the first."""
    first_item: Int[Array, " chunks"]
    of_tile: Int[Array, "T B"]
    """For each column tile its blocks, the active ones first."""
    of_tile_count: Int[Array, " T"]
    tile_slot: Int[Array, " T"]
    of_block: Int[Array, "B T"]
    """For each block its column tiles, the active ones first."""
    of_block_slot: Int[Array, "B T"]
    first_of_block: Int[Array, "chunks B"]
    """Where each chunk begins in a row of `of_block`."""


class Columns(NamedTuple):
    """The vocabulary in the order in which the backward visits it."""

    order: Int[Array, " V"]
    """Column ids, the active ones first."""
    position: Int[Array, " V"]
    """Where a column stands in `order`."""


def work(active: Bool[Array, "T B"], *, tiles: int, slots: int, group: int) -> Work:
    """Cuts the active pairs into chunks of at most `tiles` column tiles and `slots` slots.

    Active tiles must come first. `group` pairs of one tile are computed together; a tile's last
    group is filled up with blocks that nobody reads. All lists are in a fixed order.
    """
    t, b = active.shape
    if b % group or slots < 2 * b or tiles < 2:
        raise ValueError(f"{slots=} and {tiles=} are too few for {b} blocks in groups of {group}")
    tile = jnp.arange(t, dtype=jnp.int32)[:, None]
    block = jnp.arange(b, dtype=jnp.int32)[None, :]
    by_tile = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    by_block = jnp.cumsum(active, axis=0, dtype=jnp.int32)
    count = by_tile[:, -1]
    groups = (count + group - 1) // group
    # A chunk is full when its slots or its tiles are: each tile costs the larger share, in units
    # of 1 / (spare · most), and the last tile may overshoot by itself.
    spare, most = slots - b, tiles - 1
    cost = jnp.where(count > 0, jnp.maximum(groups * group * most, spare), 0)
    chunk = (jnp.cumsum(cost) - cost) // (spare * most)
    used = (count > 0).sum(dtype=jnp.int32)
    chunks = jnp.where(used > 0, chunk[jnp.maximum(used - 1, 0)] + 1, 0)
    ids = jnp.arange(-(-t // most) + -(-(t * b) // spare) + 3)
    before = (chunk[None, :] < ids[:, None]).sum(1, dtype=jnp.int32)
    first_tile = jnp.minimum(before, used)
    ends = jnp.pad(jnp.cumsum(groups), (1, 0))
    group_before = ends[:-1]
    first_item = ends[first_tile]
    tile_slot = group * (group_before - first_item[chunk])
    nth = jnp.arange(b // group, dtype=jnp.int32)[None, :]
    items = _placed(
        tile * b + nth * group, group_before[:, None] + nth, nth < groups[:, None], t * (b // group)
    )
    rank = by_tile - 1
    of_tile = _placed(jnp.broadcast_to(block, (t, b)), tile * b + rank, active, t * b).reshape(t, b)
    # Only here are the blocks' rows the longer ones.
    place = block * t + by_block - 1
    of_block = _placed(jnp.broadcast_to(tile, (t, b)), place, active, b * t).reshape(b, t)
    slot = _placed(tile_slot[:, None] + rank, place, active, b * t).reshape(b, t)
    return Work(
        chunks,
        first_tile,
        items,
        first_item,
        of_tile,
        count,
        tile_slot,
        of_block,
        slot,
        jnp.pad(by_block, ((1, 0), (0, 0)))[first_tile],
    )


def _placed(values: Array, place: Array, valid: Array, size: int) -> Int[Array, " size"]:
    """The valid values, each at its place, 0 elsewhere; all places differ.

    One scatter instead of a sort or a binary search, which take a kernel for every step.
    """
    outside = size + jnp.arange(values.size).reshape(values.shape)
    place = jnp.where(valid, place, outside).reshape(-1)
    zeros = jnp.zeros(size, jnp.int32)
    return zeros.at[place].set(values.reshape(-1), mode="drop", unique_indices=True)


def whole(
    blocks: int, live: Int[Array, ""], tiles: int, *, slots: int, group: int, together: int
) -> Work:
    """All tiles of the first `live` blocks, in whole groups.

    The number of chunks is static, and so is each pair's slot: a tile has one for every block.
    About `together` groups at a time, equally many each time, go through a chunk's tiles: then the
    L2 serves their hidden states, and a chunk's rows of the head are read again.
    """
    live = (live + group - 1) // group * group
    per_chunk = slots // blocks
    chunks = -(-tiles // per_chunk)
    first_tile = jnp.minimum(jnp.arange(chunks + 1) * per_chunk, tiles).astype(jnp.int32)
    t, b = jnp.arange(tiles, dtype=jnp.int32), jnp.arange(blocks, dtype=jnp.int32)
    tile_slot = t % per_chunk * blocks
    groups = jnp.maximum(live // group, 1)
    at_a_time = -(-groups // -(-groups // together))
    i = jnp.arange(tiles * (blocks // group), dtype=jnp.int32)
    first = i // (per_chunk * groups) * per_chunk
    i = i - first * groups
    width = jnp.clip(tiles - first, 1, per_chunk)
    first_group = i // (width * at_a_time) * at_a_time
    i = i - first_group * width
    here = jnp.clip(groups - first_group, 1, at_a_time)
    return Work(
        chunks=jnp.int32(chunks),
        first_tile=first_tile,
        items=(first + i // here) * blocks + (first_group + i % here) * group,
        first_item=first_tile * (live // group),
        of_tile=jnp.broadcast_to(b, (tiles, blocks)),
        of_tile_count=jnp.broadcast_to(live, (tiles,)),
        tile_slot=tile_slot,
        of_block=jnp.broadcast_to(t, (blocks, tiles)),
        of_block_slot=tile_slot[None, :] + b[:, None],
        first_of_block=jnp.where(b[None, :] < live, first_tile[:, None], 0),
    )


def column_bits(
    words: Int[Array, "mark_blocks 4 words"],
    rows_per_mark: int,
    live: Int[Array, ""],
    v: int,
) -> UInt[Array, "groups V"]:
    """For every column one bit a token block, 32 blocks a word.

    The forward goes no further than the `live` rows: later words hold whatever was there.
    """
    merge = BLOCK // rows_per_mark
    written = jnp.arange(words.shape[0], dtype=jnp.int32) * rows_per_mark < live
    words = jnp.where(written[:, None, None], words, 0)
    joined = lax.bitcast_convert_type(words, jnp.uint32)
    joined = joined.reshape(-1, merge * 4, joined.shape[-1])
    joined = lax.reduce(joined, jnp.uint32(0), lax.bitwise_or, (1,))
    blocks, total = joined.shape
    # Without the barrier XLA would redo the reduction for each of the 32 bits of a word.
    joined = lax.optimization_barrier(joined)
    groups = -(-blocks // 32)
    joined = jnp.pad(joined, ((0, groups * 32 - blocks), (0, 0)))
    joined = joined.reshape(groups, 32, total // 4, 1, 4, 1)
    here = (joined >> marks.BIT[None, None, None]) & jnp.uint32(1)
    place = jnp.arange(32, dtype=jnp.uint32).reshape(1, 32, 1, 1, 1, 1)
    return (here << place).sum(1, dtype=jnp.uint32).reshape(groups, total * 32)[:, :v]


def with_labels(
    bits: UInt[Array, "groups V"], labels: Int[Array, " rows"], whole: Bool[Array, " blocks"]
) -> UInt[Array, "groups V"]:
    """Adds every token's label (−1: none) to its block, and every column to the `whole` blocks."""
    groups = bits.shape[0]
    whole = jnp.pad(whole, (0, groups * 32 - whole.shape[0])).reshape(groups, 32)
    place = jnp.arange(32, dtype=jnp.uint32)
    bits |= jnp.where(whole, jnp.uint32(1) << place[None, :], 0).sum(1, dtype=jnp.uint32)[:, None]
    # A label counts once a block, and not where the forward marked it: then adding is or-ing.
    y = jnp.sort(labels.reshape(-1, BLOCK), axis=1)
    block = jnp.arange(y.shape[0])[:, None]
    fresh = (y != jnp.pad(y, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]) & (y >= 0)
    bit = jnp.uint32(1) << (block % 32).astype(jnp.uint32)
    fresh &= (bits[block // 32, y] & bit) == 0
    return bits.at[block // 32, y].add(jnp.where(fresh, bit, jnp.uint32(0)))


def columns(
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
    tiles = -(-v // tile_c)
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
