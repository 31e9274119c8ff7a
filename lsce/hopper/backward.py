"""The backward kernels: the softmax terms of chosen tiles, and the two products that use them.

For a chunk of `width` columns, gathered or in place:

    P   = (a·p − b·1[c = y])·J − s·(J − κ)      only the active (block of tokens, column tile) pairs
    dE += P·C                                   float32, over each block's active column tiles
    dC  = Pᵀ·E + constant                       float32 sums, over each tile's active blocks

P is bfloat16 in one buffer that every chunk reuses; what is not active there is never read. Each
output tile has one owner that adds in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce.hopper.engine import COLUMN, ROW, Stream, i32, launch, run, share, smem_tile
from lsce.hopper.forward import capped
from lsce.hopper.plan import BLOCK, Lists

LOG2E = math.log2(math.e)
HALF = BLOCK // 2


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the backward kernels."""

    width: int = 4096
    """Columns a chunk."""
    tile_c: int = 128
    """Columns a tile."""
    tile_d: int = 256
    """Hidden entries an output tile."""
    stage: int = 64
    """Inner dimension of one stage."""
    steps: int = 4
    """Stages in flight."""

    def __post_init__(self) -> None:
        if self.tile_c not in (128, 256):
            raise ValueError(f"{self.tile_c=} must be 128 or 256")
        if self.width % self.tile_c:
            raise ValueError(f"{self.width=} must be a multiple of {self.tile_c=}")
        if self.tile_d * self.tile_c > 256 * 128:
            raise ValueError(f"{self.tile_d=} × {self.tile_c=} does not fit the registers")


class Vectors(NamedTuple):
    """One value a row of P; all carry the cotangent and the logit scale."""

    lse: Float[Array, " rows"]
    """In log2 units."""
    a: Float[Array, " rows"]
    """Factor of the probabilities."""
    b: Float[Array, " rows"]
    """What the target's column loses."""
    s: Float[Array, " rows"]
    """Smoothing a column."""
    kappa: Float[Array, " rows"]
    """The part of the smoothing that is added elsewhere as a rank-1 term."""
    target: Int[Array, " rows"]
    """Position of the target among the columns, −1 for none."""


def probabilities(
    hidden, head, bias, vectors: Vectors, lists: Lists, where, p_ref, kept_ref, *,
    tiles: BackwardTiles, gathered: bool, scale: float, softcap: float | None, smooth: bool, v: int,
    ctas: int, interpret: Any,
) -> None:
    """Writes P of the active tiles of chunk where[0] into p_ref [rows, width].

    kept_ref [T, rows] receives each row's probability mass in each active tile.
    """
    d = hidden.shape[1]
    blocks = hidden.shape[0] // BLOCK
    k_iters = pl.cdiv(d, tiles.stage)
    tile_c = tiles.tile_c
    dtype = hidden.dtype

    def body(
        e_gmem, c_gmem, bias_gmem, lse_gmem, a_gmem, b_gmem, s_gmem, kappa_gmem, y_gmem,
        list_gmem, count_gmem, where_gmem, p_gmem, kept_gmem,
    ):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")
        chunk, row = where_gmem[0], where_gmem[1]

        def every_tile(visit, carry):
            def item(i, carry):
                code = list_gmem[row, cta + i * num]
                return visit((lax.div(code, i32(blocks)), lax.rem(code, i32(blocks))), carry)

            return lax.fori_loop(0, share(count_gmem[row], num, cta), item, carry)

        def first_column(t):
            return t * tile_c if gathered else chunk * tiles.width + t * tile_c

        def copy(tile, k, a_stage, b_stage, barrier):
            t, block = tile
            ks = pl.ds(k * tiles.stage, tiles.stage)
            plgpu.copy_gmem_to_smem(e_gmem.at[pl.ds(block * BLOCK, BLOCK), ks], a_stage, barrier)
            plgpu.copy_gmem_to_smem(
                c_gmem.at[pl.ds(first_column(t), tile_c), ks], b_stage, barrier
            )

        stream = Stream(
            steps=tiles.steps,
            a=(BLOCK, tiles.stage),
            b=(tile_c, tiles.stage),
            accumulator=(HALF, tile_c),
            length=lambda _: i32(k_iters),
            copy=copy,
            operands=lambda a, b, wg: (a.at[pl.ds(wg * HALF, HALF)], b.transpose((1, 0))),
        )

        def consume(multiply, wg, p_smem):
            def visit(tile, ring):
                t, block = tile
                acc, ring = multiply(tile, ring)
                rows = pl.ds(block * BLOCK + wg * HALF, HALF)
                of_row = lambda ref: lax.broadcast_in_dim(
                    plgpu.load(ref.at[rows], layout=ROW, optimized=False), acc.shape, [0]
                )
                z = acc * scale if scale != 1.0 else acc
                if bias is not None:
                    part = bias_gmem.at[pl.ds(first_column(t), tile_c)]
                    part = plgpu.load(part, layout=COLUMN, optimized=False)
                    z = z + lax.broadcast_in_dim(part, acc.shape, [1])
                if softcap is not None:
                    u = capped(z, softcap)
                    z = softcap * u
                p = jnp.exp2(z * LOG2E - of_row(lse_gmem))
                column = plgpu.broadcasted_iota(
                    jnp.int32, acc.shape, 1, layout=plgpu.Layout.WGMMA
                ) + (chunk * tiles.width + t * tile_c)
                if v % tiles.width:
                    p = jnp.where(column < v, p, 0.0)
                kept_gmem[t, rows] = p.sum(axis=1)
                out = p * of_row(a_gmem)
                out = out - jnp.where(column == of_row(y_gmem), of_row(b_gmem), 0.0)
                if softcap is not None:
                    slope = 1.0 - u * u
                    out = out * slope
                    if smooth:
                        out = out - of_row(s_gmem) * (slope - of_row(kappa_gmem))
                stage = p_smem.at[wg]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stage[...] = out.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stage, p_gmem.at[rows, pl.ds(t * tile_c, tile_c)])
                return ring

            every_tile(visit, i32(0))
            plgpu.wait_smem_to_gmem(0)

        run(
            stream, dtype, tiles=every_tile, consume=consume,
            scratch={"p_smem": smem_tile((HALF, tile_c), dtype, 2)},
        )

    bias_in = jnp.zeros((8,), jnp.float32) if bias is None else bias
    launch(body, (), ctas=ctas, interpret=interpret, name="lsce_probabilities")(
        hidden, head, bias_in, *vectors, lists.tiles, lists.tile_count, where, p_ref, kept_ref
    )


def accumulate_hidden(
    p_ref, head, lists: Lists, where, dh_ref, *,
    tiles: BackwardTiles, gathered: bool, ctas: int, interpret: Any,
) -> None:
    """dh_ref [rows, D] += P·C of chunk where[0], float32."""
    blocks = p_ref.shape[0] // BLOCK
    d_tiles = pl.cdiv(head.shape[1], tiles.tile_d)
    per_tile = tiles.tile_c // tiles.stage

    def body(p_gmem, c_gmem, list_gmem, count_gmem, where_gmem, dh_gmem):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")
        chunk, row = where_gmem[0], where_gmem[1]

        def every_tile(visit, carry):
            def item(i, carry):
                at = cta + i * num
                return visit((lax.div(at, i32(d_tiles)), lax.rem(at, i32(d_tiles))), carry)

            return lax.fori_loop(0, share(i32(blocks * d_tiles), num, cta), item, carry)

        def copy(tile, k, a_stage, b_stage, barrier):
            block, dt = tile
            t = list_gmem[row, block, lax.div(k, i32(per_tile))]
            column = t * tiles.tile_c + lax.rem(k, i32(per_tile)) * tiles.stage
            p_part = p_gmem.at[pl.ds(block * BLOCK, BLOCK), pl.ds(column, tiles.stage)]
            plgpu.copy_gmem_to_smem(p_part, a_stage, barrier)
            if not gathered:
                column = column + chunk * tiles.width
            c_part = c_gmem.at[pl.ds(column, tiles.stage), pl.ds(dt * tiles.tile_d, tiles.tile_d)]
            plgpu.copy_gmem_to_smem(c_part, b_stage, barrier)

        stream = Stream(
            steps=tiles.steps,
            a=(BLOCK, tiles.stage),
            b=(tiles.stage, tiles.tile_d),
            accumulator=(HALF, tiles.tile_d),
            length=lambda tile: count_gmem[row, tile[0]] * per_tile,
            copy=copy,
            operands=lambda a, b, wg: (a.at[pl.ds(wg * HALF, HALF)], b),
        )

        def consume(multiply, wg):
            def visit(tile, ring):
                block, dt = tile
                acc, ring = multiply(tile, ring)
                at = dh_gmem.at[
                    pl.ds(block * BLOCK + wg * HALF, HALF), pl.ds(dt * tiles.tile_d, tiles.tile_d)
                ]
                at[...] = plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False) + acc
                return ring

            every_tile(visit, i32(0))

        run(stream, head.dtype, tiles=every_tile, consume=consume)

    launch(body, (), ctas=ctas, interpret=interpret, name="lsce_hidden_gradient")(
        p_ref, head, lists.of_block, lists.of_block_count, where, dh_ref
    )


def head_gradient(
    p_ref, hidden, lists: Lists, where, constant, dc_ref, *,
    tiles: BackwardTiles, gathered: bool, ctas: int, interpret: Any,
) -> None:
    """dc_ref [width or V, D] = Pᵀ·E + constant [D] for the columns of chunk where[0]."""
    d_tiles = pl.cdiv(hidden.shape[1], tiles.tile_d)
    c_tiles = tiles.width // tiles.tile_c
    half_c = tiles.tile_c // 2
    per_block = BLOCK // tiles.stage
    dtype = hidden.dtype

    def body(p_gmem, e_gmem, constant_gmem, list_gmem, count_gmem, where_gmem, dc_gmem):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")
        chunk, row = where_gmem[0], where_gmem[1]

        def every_tile(visit, carry):
            def item(i, carry):
                at = cta + i * num
                return visit((lax.div(at, i32(d_tiles)), lax.rem(at, i32(d_tiles))), carry)

            return lax.fori_loop(0, share(i32(c_tiles * d_tiles), num, cta), item, carry)

        def copy(tile, k, a_stage, b_stage, barrier):
            t, dt = tile
            block = list_gmem[row, t, lax.div(k, i32(per_block))]
            token = block * BLOCK + lax.rem(k, i32(per_block)) * tiles.stage
            p_part = p_gmem.at[pl.ds(token, tiles.stage), pl.ds(t * tiles.tile_c, tiles.tile_c)]
            plgpu.copy_gmem_to_smem(p_part, a_stage, barrier)
            e_part = e_gmem.at[pl.ds(token, tiles.stage), pl.ds(dt * tiles.tile_d, tiles.tile_d)]
            plgpu.copy_gmem_to_smem(e_part, b_stage, barrier)

        stream = Stream(
            steps=tiles.steps,
            a=(tiles.stage, tiles.tile_c),
            b=(tiles.stage, tiles.tile_d),
            accumulator=(half_c, tiles.tile_d),
            length=lambda tile: count_gmem[row, tile[0]] * per_block,
            copy=copy,
            operands=lambda a, b, wg: (a.at[:, pl.ds(wg * half_c, half_c)].transpose((1, 0)), b),
        )

        def consume(multiply, wg, out_smem):
            def visit(tile, ring):
                t, dt = tile
                acc, ring = multiply(tile, ring)
                columns = pl.ds(dt * tiles.tile_d, tiles.tile_d)
                row = plgpu.load(constant_gmem.at[columns], layout=COLUMN, optimized=False)
                out = acc + lax.broadcast_in_dim(row, acc.shape, [1])
                stage = out_smem.at[wg]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stage[...] = out.astype(dtype)
                plgpu.commit_smem()
                first = t * tiles.tile_c + wg * half_c
                if not gathered:
                    first = first + chunk * tiles.width
                plgpu.copy_smem_to_gmem(stage, dc_gmem.at[pl.ds(first, half_c), columns])
                return ring

            every_tile(visit, i32(0))
            plgpu.wait_smem_to_gmem(0)

        run(
            stream, dtype, tiles=every_tile, consume=consume,
            scratch={"out_smem": smem_tile((half_c, tiles.tile_d), dtype, 2)},
        )

    launch(body, (), ctas=ctas, interpret=interpret, name="lsce_head_gradient")(
        p_ref, hidden, constant, lists.of_tile, lists.of_tile_count, where, dc_ref
    )
