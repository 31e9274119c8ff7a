"""Which tiles the backward computes: lists of (column tile, token block) pairs that kernels walk.

The columns that some block of tokens needs are brought together (`columns`), so that the work is a
list of pairs, known on the device only. Nothing here has a capacity that could overflow: every list
is as long as if all tiles were active.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lsce.problem import cdiv


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


def work(active: Bool[Array, "T B"], *, tiles: int, slots: int, group: int) -> Work:
    """Cuts the active pairs into chunks of at most `tiles` column tiles and `slots` slots.

    Active tiles must come first. `group` pairs of one tile are computed together; a tile's last
    group is filled up with blocks that nobody reads. All lists are in a fixed order.
    """
    t, b = active.shape
    if b % group or slots < 2 * b or tiles < 2:
        raise ValueError(f"{slots=} and {tiles=} are too few for {b} blocks in groups of {group}")
    pairs = _counted(active, group)
    count, groups = pairs.of_tile, pairs.groups
    # A chunk is full when its slots or its tiles are: each tile costs the larger share, in units
    # of 1 / (spare · most), and the last tile may overshoot by itself.
    spare, most = slots - b, tiles - 1
    cost = jnp.where(count > 0, jnp.maximum(groups * group * most, spare), 0)
    chunk = (jnp.cumsum(cost) - cost) // (spare * most)
    used = (count > 0).sum(dtype=jnp.int32)
    chunks = jnp.where(used > 0, chunk[jnp.maximum(used - 1, 0)] + 1, 0)
    ids = jnp.arange(cdiv(t, most) + cdiv(t * b, spare) + 3)
    before = (chunk[None, :] < ids[:, None]).sum(1, dtype=jnp.int32)
    first_tile = jnp.minimum(before, used)
    return _listed(pairs, chunk, chunks, first_tile)


class _Pairs(NamedTuple):
    """The active pairs, and how many there are up to each."""

    active: Bool[Array, "T B"]
    group: int
    tile: Int[Array, "T 1"]
    block: Int[Array, "1 B"]
    by_tile: Int[Array, "T B"]
    """Running counts along a tile's blocks, and by_block along a block's tiles."""
    by_block: Int[Array, "T B"]
    of_tile: Int[Array, " T"]
    groups: Int[Array, " T"]


def _counted(active: Bool[Array, "T B"], group: int) -> _Pairs:
    t, b = active.shape
    tile = jnp.arange(t, dtype=jnp.int32)[:, None]
    block = jnp.arange(b, dtype=jnp.int32)[None, :]
    by_tile = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    by_block = jnp.cumsum(active, axis=0, dtype=jnp.int32)
    count = by_tile[:, -1]
    groups = (count + group - 1) // group
    return _Pairs(active, group, tile, block, by_tile, by_block, count, groups)


def _listed(
    pairs: _Pairs,
    chunk: Int[Array, " T"],
    chunks: Int[Array, ""],
    first_tile: Int[Array, " chunks"],
) -> Work:
    """The lists of the active pairs, given each tile's chunk, and how the chunks begin."""
    active, group, tile, block, by_tile, by_block, count, groups = pairs
    t, b = active.shape
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


def dense_work(
    blocks: int,
    live: Int[Array, ""],
    tiles: int,
    *,
    slots: int,
    group: int,
    together: int,
    kept: bool = False,
) -> Work:
    """All tiles of the first `live` blocks, in whole groups.

    The number of chunks is static, and so is each pair's slot: a tile has one for every block.
    About `together` groups at a time, equally many each time, go through a chunk's tiles: then the
    L2 serves their hidden states, and a chunk's rows of the head are read again.

    Every chunk has the first one's slots; where P is `kept` the chunks after it have slots of their
    own, counted anew in another buffer.
    """
    live = (live + group - 1) // group * group
    per_chunk = slots // blocks
    chunks = cdiv(tiles, per_chunk)
    first_tile = jnp.minimum(jnp.arange(chunks + 1) * per_chunk, tiles).astype(jnp.int32)
    t, b = jnp.arange(tiles, dtype=jnp.int32), jnp.arange(blocks, dtype=jnp.int32)
    place = jnp.where(t < per_chunk, t, t - per_chunk) if kept else t % per_chunk
    tile_slot = place * blocks
    groups = jnp.maximum(live // group, 1)
    at_a_time = cdiv(groups, cdiv(groups, together))
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
