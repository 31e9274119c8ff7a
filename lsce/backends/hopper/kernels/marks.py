"""One bit a vocabulary column: can any token of a block give it a probability above the filter?

A warpgroup holds a tile of logits [tile_n, tile_v] in the WGMMA layout: a thread owns, of every 8
columns j, the two at 8j + 2q + c (q = lane mod 4, c = 0, 1) and, of every 16 rows of its warp, the
rows lane // 4 and lane // 4 + 8. It can therefore pack 16 j's into one 32-bit word without talking
to anybody; three shuffles join the eight lanes that own the same columns, and each of the four
warps writes its own words, so that no two warps ever meet: no shared memory, no atomics, no race.

Words of one tile: [4 warps, tile_v / 128, 4 (q)], bit 2 (j mod 16) + c.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jaxlib.mlir.dialects import nvvm
from jaxtyping import Array, Bool, Int, UInt

from lsce.backends.hopper.kernels.pipeline import ROW
from lsce.problem import cdiv
from lsce.sparse.tokens import BLOCK

BIT = (np.arange(16)[:, None, None] * 2 + np.arange(2)).astype(np.uint32)
"""The bit of [16 (j), 1 (q), 2 (c)] in its word."""


def words(tile_v: int) -> int:
    """32-bit words that one warp writes for a tile."""
    return tile_v // 32


def store(x, top, bound, marks_gmem, block, tile, *, interpret: bool) -> None:
    """Marks the columns of `x` [tile_n, tile_v] in which some row exceeds its `bound` [tile_n].

    Writes marks_gmem[block, warp, tile · tile_v/32 : …] for the four warps. `top` is each row's
    maximum of x: a warp none of whose rows exceeds its bound there has nothing to look for, which
    is so for 85% of them on real text.
    """
    tile_n, tile_v = x.shape
    if interpret:
        hit = (x > bound[:, None]).reshape(tile_n // 64, 4, 16, tile_v // 128, 16, 4, 2)
        hit = jnp.any(hit, axis=(0, 2))  # [4 warps, tile_v/128, 16 j, 4 q, 2 c]
        j, c = (jax.lax.broadcasted_iota(jnp.uint32, (16, 1, 2), axis) for axis in (0, 2))
        value = jnp.where(hit, np.uint32(1) << (2 * j + c), np.uint32(0)).sum(
            (2, 4), dtype=jnp.uint32
        )
        value = jax.lax.bitcast_convert_type(value, jnp.int32).reshape(4, words(tile_v))
        marks_gmem[block, :, pl.ds(tile * words(tile_v), words(tile_v))] = value
        return

    inline: Any = plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            ROW,
            ROW,
            plgpu.RefType(),
            plgpu.Layout.WG_SPLAT,
            plgpu.Layout.WG_SPLAT,
        )
    )

    @inline
    def device_store(_, x, top, bound, marks, block, tile):
        i32 = ir.IntegerType.get_signless(32)
        const = lambda value: arith.constant(i32, ir.IntegerAttr.get(i32, value))
        at = lambda reg, i=0: vector.extract(
            reg, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
        )
        exceeds = lambda a, b: arith.cmpf(arith.CmpFPredicate.OGT, a, b)
        any_of = lambda flags: functools.reduce(arith.ori, flags)
        rows = [(i, 0, h, 0, 0) for i in range(tile_n // 64) for h in range(2)]
        bounds = {row: at(bound.registers[row]) for row in rows}

        def pack(group):
            word = const(0)
            for j in range(16):
                for c in range(2):
                    value = lambda row, j=group * 16 + j, c=c: at(
                        x.registers[row[0], j, 0, 0, row[2], 0, 0, 0, 0], c
                    )
                    hit = any_of(exceeds(value(row), bounds[row]) for row in rows)
                    # Signed: bit 31 is the sign bit of an MLIR i32 constant.
                    bit = 1 << (2 * j + c)
                    bit = bit - (1 << 32) if bit >= 1 << 31 else bit
                    word = arith.ori(word, arith.select(hit, const(bit), const(0)))
            for distance in (4, 8, 16):
                word = arith.ori(word, mgpu_utils.shfl_bfly(word, distance))
            return word

        found = any_of(exceeds(at(top.registers[row]), bounds[row]) for row in rows)
        # A vote is the same for all lanes, and the compiler knows it. After a branch that might
        # divide a warp it makes every product wait for the one before (ptxas C7520).
        found = nvvm.vote_sync(const(-1), found, nvvm.VoteSyncKind.any)
        groups = tile_v // 128
        looked: Any = scf.IfOp(found, [i32] * groups, has_else=True)
        with ir.InsertionPoint(looked.then_block):
            scf.yield_([pack(group) for group in range(groups)])
        with ir.InsertionPoint(looked.else_block):
            scf.yield_([const(0)] * groups)

        index = ir.IndexType.get()
        as_index = lambda value: arith.index_cast(index, value)
        lane = arith.andi(mgpu_utils.thread_idx(), const(31))
        warp = arith.andi(arith.shrui(mgpu_utils.thread_idx(), const(5)), const(3))
        block, tile = block.registers.item(), tile.registers.item()
        first = arith.addi(arith.muli(tile, const(words(tile_v))), lane)
        writes = arith.cmpi(arith.CmpIPredicate.ult, lane, const(4))
        with ir.InsertionPoint(scf.IfOp(writes).then_block):
            for group, word in enumerate(looked.results):
                column = arith.addi(first, const(4 * group))
                memref.store(word, marks, [as_index(block), as_index(warp), as_index(column)])
            scf.yield_([])

    device_store(x, top, bound, marks_gmem, block, tile)


def unpack(marks: Int[Array, "blocks 4 words"], v: int) -> Bool[Array, "blocks V"]:
    """The bits as one boolean a block and column, the four warps joined."""
    blocks, _, total = marks.shape
    joined = jax.lax.bitcast_convert_type(marks, jnp.uint32)
    joined = (joined[:, 0] | joined[:, 1]) | (joined[:, 2] | joined[:, 3])
    joined = joined.reshape(blocks, total // 4, 1, 4, 1)  # group, j, q, c
    return ((joined >> BIT[None, None]) & np.uint32(1) != 0).reshape(blocks, total * 32)[:, :v]


def of_any_block(
    marks: Int[Array, "blocks 4 words"], rows_per_mark: int, live: Int[Array, ""], v: int
) -> Bool[Array, " V"]:
    """Which columns any block has marked, of those that the forward has written."""
    written = jnp.arange(marks.shape[0], dtype=jnp.int32) * rows_per_mark < live
    marks = jnp.where(written[:, None, None], marks, 0)
    joined = jax.lax.reduce(marks, jnp.int32(0), jax.lax.bitwise_or, (0,))
    return unpack(joined[None], v)[0]


def column_bits(
    marks: Int[Array, "mark_blocks 4 words"],
    rows_per_mark: int,
    live: Int[Array, ""],
    v: int,
) -> UInt[Array, "groups V"]:
    """For every column one bit a token block, 32 blocks a word.

    The forward goes no further than the `live` rows: later words hold whatever was there.
    """
    merge = BLOCK // rows_per_mark
    written = jnp.arange(marks.shape[0], dtype=jnp.int32) * rows_per_mark < live
    marks = jnp.where(written[:, None, None], marks, 0)
    joined = jax.lax.bitcast_convert_type(marks, jnp.uint32)
    joined = joined.reshape(-1, merge * 4, joined.shape[-1])
    joined = jax.lax.reduce(joined, jnp.uint32(0), jax.lax.bitwise_or, (1,))
    blocks, total = joined.shape
    # Without the barrier XLA would redo the reduction for each of the 32 bits of a word.
    joined = jax.lax.optimization_barrier(joined)
    groups = cdiv(blocks, 32)
    joined = jnp.pad(joined, ((0, groups * 32 - blocks), (0, 0)))
    joined = joined.reshape(groups, 32, total // 4, 1, 4, 1)
    here = (joined >> BIT[None, None, None]) & jnp.uint32(1)
    shift = jnp.arange(32, dtype=jnp.uint32).reshape(1, 32, 1, 1, 1, 1)
    return (here << shift).sum(1, dtype=jnp.uint32).reshape(groups, total * 32)[:, :v]
