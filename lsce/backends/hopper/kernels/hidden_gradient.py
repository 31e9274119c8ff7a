"""dE += P·C: float32 sums over each block's active column tiles, added in a fixed order."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from lsce.backends.hopper.kernels.pipeline import Stream, i32, launch, run, share
from lsce.backends.hopper.kernels.probabilities import HALF, p_address
from lsce.backends.hopper.tiles import BackwardTiles
from lsce.sparse.plan import Work
from lsce.sparse.tokens import BLOCK


def accumulate_hidden(
    p_ref,
    head,
    work: Work,
    chunk,
    dh_ref,
    *,
    tiles: BackwardTiles,
    gathered: bool,
    dense: bool,
    panels: int = 1,
    ctas: int,
    interpret: Any,
) -> None:
    """dh_ref [splits, rows, D] += P·C of a chunk, float32, each split over a part of the columns.

    `dense` says that neighbouring blocks have the same tiles, so that they can share the head's.
    """
    cluster = tiles.cluster if dense else 1
    splits = dh_ref.shape[0]
    blocks = dh_ref.shape[1] // BLOCK
    d_tiles = pl.cdiv(head.shape[1], tiles.hidden_d)
    per_tile = tiles.tile_c // tiles.stage

    def body(
        p_gmem, c_gmem, first_gmem, first_tile_gmem, of_block_gmem, slot_gmem, chunk_gmem, dh_gmem
    ):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")
        member = lax.axis_index("member") if cluster > 1 else i32(0)
        chunk = chunk_gmem[0]
        first_tile = first_tile_gmem[chunk]

        def every_tile(visit, carry):
            def item(i, carry):
                at = cta + i * num
                rest, dt = lax.div(at, i32(d_tiles)), lax.rem(at, i32(d_tiles))
                split = lax.rem(rest, i32(splits))
                block = lax.div(rest, i32(splits)) * cluster + member
                first = first_gmem[chunk, block]
                count = first_gmem[chunk + 1, block] - first
                before = lax.div(count * split, i32(splits))
                count = lax.div(count * (split + 1), i32(splits)) - before
                return visit((split, block, dt, first + before, count), carry)

            items = i32(blocks // cluster * splits * d_tiles)
            return lax.fori_loop(0, share(items, num, cta), item, carry)

        def copy(tile, k, a_stage, b_stage, barrier):
            _, block, dt, first, _ = tile
            at = first + lax.div(k, i32(per_tile))
            inner = lax.rem(k, i32(per_tile)) * tiles.stage
            row, column = p_address(slot_gmem[block, at], panels, tiles.tile_c)
            p_part = p_gmem.at[pl.ds(row, BLOCK), pl.ds(column + inner, tiles.stage)]
            plgpu.copy_gmem_to_smem(p_part, a_stage, barrier)
            t = of_block_gmem[block, at]
            c_rows = pl.ds((t - first_tile if gathered else t) * tiles.tile_c + inner, tiles.stage)
            c_part = c_gmem.at[c_rows, pl.ds(dt * tiles.hidden_d, tiles.hidden_d)]
            plgpu.copy_gmem_to_smem(
                c_part, b_stage, barrier, collective_axes="member" if cluster > 1 else None
            )

        stream = Stream(
            steps=tiles.fitting(BLOCK + tiles.hidden_d),
            a=(BLOCK, tiles.stage),
            b=(tiles.stage, tiles.hidden_d),
            accumulator=(HALF, tiles.hidden_d),
            length=lambda tile: tile[4] * per_tile,
            copy=copy,
            operands=lambda a, b, wg: (a.at[pl.ds(wg * HALF, HALF)], b),
        )

        def consume(consumer):
            wg = consumer.number

            def visit(tile, ring):
                split, block, dt, _, count = tile
                acc, ring = consumer.multiply(tile, ring)

                @pl.when(count > 0)
                def _():
                    rows = pl.ds(block * BLOCK + wg * HALF, HALF)
                    at = dh_gmem.at[split, rows, pl.ds(dt * tiles.hidden_d, tiles.hidden_d)]
                    old = plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False)
                    at[...] = old + acc

                return ring

            every_tile(visit, i32(0))

        run(stream, head.dtype, tiles=every_tile, consume=consume, cluster=cluster > 1)

    launch(
        body,
        (),
        ctas=max(ctas // cluster, 1),
        cluster=cluster,
        interpret=interpret,
        name="lsce_hidden_gradient",
    )(
        p_ref,
        head,
        work.first_of_block,
        work.first_tile,
        work.of_block,
        work.of_block_slot,
        chunk,
        dh_ref,
    )
