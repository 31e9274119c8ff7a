"""dC = Pᵀ·E + constant: float32 sums over each column tile's active blocks.

Each output tile has one owner that adds in a fixed order: the same inputs give the same bits.
"""

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
    Stream,
    i32,
    launch,
    run,
    share,
    store_stage,
    store_tile,
)
from lsce.backends.hopper.kernels.probabilities import p_address
from lsce.backends.hopper.tiles import BackwardTiles
from lsce.sparse.plan import Work
from lsce.sparse.tokens import BLOCK


@functools.partial(
    jax.jit, static_argnames=("tiles", "gathered", "add", "split", "panels", "ctas", "interpret")
)
def head_gradient(
    p_ref,
    hidden,
    work: Work,
    chunk,
    constant,
    dc_ref,
    *,
    tiles: BackwardTiles,
    gathered: bool,
    low_ref: Any = None,
    add: bool = False,
    split: bool = False,
    after: Any = None,
    panels: int = 1,
    factors: Any = None,
    ctas: int,
    interpret: Any,
) -> None:
    """dc_ref [width or V, D] = Pᵀ·E + constant [D] for the columns of a chunk.

    P lies in p_ref, or in rows of other columns of dc_ref, where p_ref is None.

    `after` is only there to be waited for: where dc_ref replaces something, XLA copies that first
    if it cannot know that its other readers are done.

    low_ref sums over calls in more than bfloat16: with `add` the result so far, dc_ref + low_ref,
    is added; with `split` low_ref receives what rounding cuts off dc_ref. Without a low_ref the
    result so far is dc_ref alone.

    With `factors` of hidden entries P and E are of 8 bits and come transposed, P as tiles of
    [tile_c, BLOCK] and E as [D, rows], and their product is multiplied by them.
    """
    exact = low_ref is not None
    within = p_ref is None
    after = constant if after is None else after
    turned = factors is not None
    d_tiles = pl.cdiv(hidden.shape[0 if turned else 1], tiles.head_d)
    parts = tiles.tile_c // tiles.head_c
    half_c = tiles.head_c // 2
    stage = 2 * tiles.stage if turned else tiles.stage  # as many bytes
    per_block = BLOCK // stage
    # Two CTAs with parts of one column tile read the same hidden states, two with the same columns
    # the same P.
    share_hidden = parts % tiles.cluster == 0
    cluster = tiles.cluster if share_hidden or d_tiles % tiles.cluster == 0 else 1
    shared = "member" if cluster > 1 else None
    dtype = dc_ref.dtype
    shape = lambda width: (width, stage) if turned else (stage, width)

    def body(
        p_gmem,
        e_gmem,
        constant_gmem,
        first_tile_gmem,
        of_tile_gmem,
        count_gmem,
        slot_gmem,
        chunk_gmem,
        dc_gmem,
        low_gmem,
        _,
        *factors_gmem,
    ):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")
        member = lax.axis_index("member") if cluster > 1 else i32(0)
        chunk = chunk_gmem[0]
        first_tile = first_tile_gmem[chunk]

        def every_tile(visit, carry):
            def item(i, carry):
                at = (cta + i * num) * cluster + member
                t = first_tile + lax.div(at, i32(d_tiles * parts))
                at = lax.rem(at, i32(d_tiles * parts))
                if share_hidden:
                    dt, part = lax.div(at, i32(parts)), lax.rem(at, i32(parts))
                else:
                    part, dt = lax.div(at, i32(d_tiles)), lax.rem(at, i32(d_tiles))
                return visit((t, part, dt, slot_gmem[t], count_gmem[t]), carry)

            items = (first_tile_gmem[chunk + 1] - first_tile) * (d_tiles * parts // cluster)
            return lax.fori_loop(0, share(items, num, cta), item, carry)

        def copy(tile, k, a_stage, b_stage, barrier):
            t, part, dt, slot, _ = tile
            rank = lax.div(k, i32(per_block))
            inner = lax.rem(k, i32(per_block)) * stage
            if turned:
                row = (slot + rank) * tiles.tile_c + part * tiles.head_c
                p_part = p_gmem.at[pl.ds(row, tiles.head_c), pl.ds(inner, stage)]
            else:
                row, column = p_address(slot + rank, panels, tiles.tile_c)
                p_rows = pl.ds(row + inner, stage)
                p_columns = pl.ds(column + part * tiles.head_c, tiles.head_c)
                p_part = (dc_gmem if within else p_gmem).at[p_rows, p_columns]
            plgpu.copy_gmem_to_smem(
                p_part,
                a_stage,
                barrier,
                collective_axes=None if share_hidden else shared,
            )
            e_rows = pl.ds(of_tile_gmem[t, rank] * BLOCK + inner, stage)
            e_part = e_rows, pl.ds(dt * tiles.head_d, tiles.head_d)
            plgpu.copy_gmem_to_smem(
                e_gmem.at[e_part[::-1] if turned else e_part],
                b_stage,
                barrier,
                collective_axes=shared if share_hidden else None,
            )

        def operands(a, b, wg):
            mine = pl.ds(wg * half_c, half_c)
            if turned:
                return a.at[mine], b.transpose((1, 0))
            return a.at[:, mine].transpose((1, 0)), b

        stream = Stream(
            steps=tiles.fitting(tiles.head_c + tiles.head_d, (half_c, tiles.head_d)),
            a=shape(tiles.head_c),
            b=shape(tiles.head_d),
            accumulator=(half_c, tiles.head_d),
            length=lambda tile: tile[4] * per_block,
            copy=copy,
            operands=operands,
        )

        def consume(consumer, out_smem):
            wg = consumer.number

            def visit(tile, ring):
                acc, ring = consumer.multiply(tile, ring)
                t, part, dt, _, _ = tile
                columns = pl.ds(dt * tiles.head_d, tiles.head_d)
                row = plgpu.load(constant_gmem.at[columns], layout=COLUMN, optimized=False)
                if turned:
                    some = plgpu.load(factors_gmem[0].at[columns], layout=COLUMN, optimized=False)
                    acc = acc * lax.broadcast_in_dim(some, acc.shape, [1])
                out = acc + lax.broadcast_in_dim(row, acc.shape, [1])
                first = (t - first_tile if gathered else t) * tiles.tile_c
                first = first + part * tiles.head_c + wg * half_c
                here = pl.ds(first, half_c), columns
                if add:
                    for so_far in (dc_gmem, low_gmem) if exact else (dc_gmem,):
                        so_far = so_far.at[here]
                        old = plgpu.load(so_far, layout=plgpu.Layout.WGMMA, optimized=False)
                        out = out + old.astype(jnp.float32)
                rounded = out.astype(dtype)
                store_tile(rounded, out_smem.at[wg], dc_gmem.at[here])
                if split:
                    rest = (out - rounded.astype(jnp.float32)).astype(dtype)
                    store_tile(rest, out_smem.at[wg], low_gmem.at[here])
                return ring

            every_tile(visit, i32(0))
            plgpu.wait_smem_to_gmem(0)

        run(
            stream,
            hidden.dtype,
            tiles=every_tile,
            consume=consume,
            cluster=cluster > 1,
            scratch={"out_smem": store_stage(half_c, tiles.head_d, dtype)},
        )

    launch(
        body,
        (),
        ctas=max(ctas // cluster, 1),
        cluster=cluster,
        interpret=interpret,
        name="lsce_head_gradient",
    )(
        constant if within else p_ref,
        hidden,
        constant,
        work.first_tile,
        work.of_tile,
        work.of_tile_count,
        work.tile_slot,
        chunk,
        dc_ref,
        low_ref if exact else constant,
        after,
        *([factors] if turned else ()),
    )
