"""dE += P·C: float32 sums over each block's active column tiles, added in a fixed order."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lsce.backends.hopper.kernels.pipeline import (
    COLUMN,
    ROW,
    Stream,
    i32,
    launch,
    run,
    share,
    smem_tile,
    store,
)
from lsce.backends.hopper.kernels.probabilities import HALF, p_address
from lsce.backends.hopper.tiles import CONSUMERS, BackwardTiles
from lsce.sparse.plan import Work
from lsce.sparse.tokens import BLOCK

AT_A_TIME = 64
"""Hidden entries of a consumer's tile that are on their way out at a time: 16 KB."""


@functools.partial(
    jax.jit, static_argnames=("tiles", "gathered", "dense", "panels", "ctas", "interpret")
)
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
    factors: tuple[Any, Any] | None = None,
    ctas: int,
    interpret: Any,
) -> None:
    """dh_ref [splits, rows, D] += P·C of a chunk, float32, each split over a part of the columns.

    `dense` says that neighbouring blocks have the same tiles, so that they can share the head's.
    With `factors` of rows and of hidden entries P and C are of 8 bits, C as [D, columns], and what
    is added is their product times both.
    """
    cluster = tiles.cluster if dense else 1
    splits = dh_ref.shape[0]
    blocks = dh_ref.shape[1] // BLOCK
    d_tiles = pl.cdiv(head.shape[0 if factors else 1], tiles.hidden_d)
    stage = tiles.stage if factors is None else 2 * tiles.stage  # as many bytes
    per_tile = tiles.tile_c // stage
    b_shape = (stage, tiles.hidden_d) if factors is None else (tiles.hidden_d, stage)

    def body(
        p_gmem,
        c_gmem,
        first_gmem,
        first_tile_gmem,
        of_block_gmem,
        slot_gmem,
        chunk_gmem,
        dh_gmem,
        *factors_gmem,
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
            inner = lax.rem(k, i32(per_tile)) * stage
            row, column = p_address(slot_gmem[block, at], panels, tiles.tile_c)
            p_part = p_gmem.at[pl.ds(row, BLOCK), pl.ds(column + inner, stage)]
            plgpu.copy_gmem_to_smem(p_part, a_stage, barrier)
            t = of_block_gmem[block, at]
            c_rows = pl.ds((t - first_tile if gathered else t) * tiles.tile_c + inner, stage)
            c_part = c_rows, pl.ds(dt * tiles.hidden_d, tiles.hidden_d)
            c_part = c_gmem.at[c_part if factors is None else c_part[::-1]]
            plgpu.copy_gmem_to_smem(
                c_part, b_stage, barrier, collective_axes="member" if cluster > 1 else None
            )

        stream = Stream(
            steps=tiles.fitting(BLOCK + tiles.hidden_d, (HALF, 256)),
            a=(BLOCK, stage),
            b=b_shape,
            accumulator=(HALF, tiles.hidden_d),
            length=lambda tile: tile[4] * per_tile,
            copy=copy,
            operands=lambda a, b, wg: (
                a.at[pl.ds(wg * HALF, HALF)],
                b if factors is None else b.transpose((1, 0)),
            ),
        )

        def consume(consumer, sums_smem):
            wg = consumer.number

            def visit(tile, ring):
                split, block, dt, _, count = tile
                acc, ring = consumer.multiply(tile, ring)

                @pl.when(count > 0)
                def _():
                    rows = pl.ds(block * BLOCK + wg * HALF, HALF)
                    of_rows = None
                    if factors is not None:
                        of_rows = plgpu.load(factors_gmem[0].at[rows], layout=ROW, optimized=False)
                    # Nobody else adds to this tile meanwhile: the same inputs give the same bits.
                    for start in range(0, tiles.hidden_d, AT_A_TIME):
                        new = acc[:, start : start + AT_A_TIME]
                        entries = pl.ds(dt * tiles.hidden_d + start, AT_A_TIME)
                        if of_rows is not None:
                            some = factors_gmem[1].at[entries]
                            some = plgpu.load(some, layout=COLUMN, optimized=False)
                            new = new * lax.broadcast_in_dim(of_rows, new.shape, [0])
                            new = new * lax.broadcast_in_dim(some, new.shape, [1])
                        at = dh_gmem.at[split, rows, entries]
                        if interpret is None:
                            store(new, sums_smem.at[wg], at, add=True)
                        else:  # the interpreter has no such copies
                            old = plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False)
                            at[...] = old + new

                return ring

            every_tile(visit, i32(0))
            plgpu.wait_smem_to_gmem(0)

        run(
            stream,
            head.dtype,
            tiles=every_tile,
            consume=consume,
            cluster=cluster > 1,
            scratch={"sums_smem": smem_tile((CONSUMERS, HALF, AT_A_TIME), jnp.float32)},
        )

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
        *(factors or ()),
    )
