"""The backward kernels: the softmax terms of chosen tiles, and the two products that use them.

For a chunk of `width` columns, gathered or in place:

    P   = (a·p − b·1[c = y])·J − s·(J − κ)      only the active (block of tokens, column tile) pairs
    dE += P·C                                   float32, over each block's active column tiles
    dC  = Pᵀ·E + constant                       float32 sums, over each tile's active blocks

P is bfloat16 in one buffer that every chunk reuses; what is not active there is never read. Its
tiles lie one below the other, or `panels` of them side by side in a wider array. Each output tile
has one owner that adds in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce.backends.hopper.kernels.lse_forward import capped
from lsce.backends.hopper.kernels.pipeline import (
    COLUMN,
    ROW,
    Stream,
    i32,
    launch,
    pieces,
    run,
    share,
    store,
    store_stage,
    store_tile,
)
from lsce.backends.hopper.tiles import BackwardTiles
from lsce.sparse.plan import BLOCK, Work

LOG2E = math.log2(math.e)
HALF = BLOCK // 2


class Vectors(NamedTuple):
    """One value a row of P; a, b and s carry the cotangent and the logit scale."""

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


def _place(slot, panels: int, tile_c: int):
    """Row and column at which a slot begins in P's buffer."""
    if panels == 1:
        return slot * BLOCK, i32(0)
    return lax.div(slot, i32(panels)) * BLOCK, lax.rem(slot, i32(panels)) * tile_c


def probabilities(
    hidden,
    head,
    bias,
    vectors: Vectors,
    work: Work,
    chunk,
    p_ref,
    kept_ref,
    *,
    tiles: BackwardTiles,
    gathered: bool,
    scale: float,
    softcap: float | None,
    smooth: bool,
    v: int,
    panels: int = 1,
    only_p: bool = False,
    ctas: int,
    interpret: Any,
) -> None:
    """Writes P of a chunk's active pairs into their slots of p_ref [slots · BLOCK, tile_c].

    With `only_p` P is p itself, as if a were 1 and there were no target. kept_ref [slots · BLOCK]
    receives each row's probability mass in the tile. With `panels`, p_ref is
    [⌈slots / panels⌉ · BLOCK, panels · tile_c] or larger.
    """
    d = hidden.shape[1]
    blocks = hidden.shape[0] // BLOCK
    k_iters = pl.cdiv(d, tiles.stage)
    tile_c = tiles.tile_c
    per_cta, part_rows = tiles.blocks, tiles.blocks * HALF
    dtype = hidden.dtype

    def body(
        e_gmem,
        c_gmem,
        bias_gmem,
        lse_gmem,
        a_gmem,
        b_gmem,
        s_gmem,
        kappa_gmem,
        y_gmem,
        item_gmem,
        first_item_gmem,
        first_tile_gmem,
        of_tile_gmem,
        slot_gmem,
        chunk_gmem,
        p_gmem,
        kept_gmem,
    ):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")
        member = lax.axis_index("member") if tiles.cluster > 1 else i32(0)
        chunk = chunk_gmem[0]
        first_item = first_item_gmem[chunk]
        first_tile = first_tile_gmem[chunk]

        def every_tile(visit, carry):
            def item(i, carry):
                code = item_gmem[first_item + cta + i * num]
                rank = lax.rem(code, i32(blocks)) + member * per_cta
                return visit((lax.div(code, i32(blocks)), rank), carry)

            mine = share(first_item_gmem[chunk + 1] - first_item, num, cta)
            return lax.fori_loop(0, mine, item, carry)

        def first_column(t):
            return (t - first_tile if gathered else t) * tile_c

        def copy(tile, k, a_stage, b_stage, barrier):
            t, rank = tile
            ks = pl.ds(k * tiles.stage, tiles.stage)
            for i in range(per_cta):
                rows = pl.ds(of_tile_gmem[t, rank + i] * BLOCK, BLOCK)
                to = a_stage.at[pl.ds(i * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(e_gmem.at[rows, ks], to, barrier)
            plgpu.copy_gmem_to_smem(
                c_gmem.at[pl.ds(first_column(t), tile_c), ks],
                b_stage,
                barrier,
                collective_axes="member" if tiles.cluster > 1 else None,
            )

        stream = Stream(
            steps=tiles.fitting(per_cta * BLOCK + tile_c, (part_rows, tile_c)),
            a=(per_cta * BLOCK, tiles.stage),
            b=(tile_c, tiles.stage),
            accumulator=(part_rows, tile_c),
            length=lambda _: i32(k_iters),
            copy=copy,
            operands=lambda a, b, wg: (a.at[pl.ds(wg * part_rows, part_rows)], b.transpose((1, 0))),
            copies=per_cta + 1,
        )

        def consume(consumer, p_smem):
            wg = consumer.number

            def visit(tile, ring):
                t, rank = tile
                begin = lax.rem(wg * part_rows, i32(BLOCK))
                rank = rank + lax.div(wg * part_rows, i32(BLOCK))
                rows = pl.ds(of_tile_gmem[t, rank] * BLOCK + begin, part_rows)
                of_row = lambda ref: plgpu.load(ref.at[rows], layout=ROW, optimized=False)
                # Loaded before the product, which hides the time that takes.
                lse, a, b = of_row(lse_gmem), of_row(a_gmem), of_row(b_gmem)
                y = of_row(y_gmem) - t * tile_c
                acc, ring = consumer.multiply(tile, ring)
                slot = slot_gmem[t] + rank
                first_row, left = _place(slot, panels, tile_c)
                to = pl.ds(first_row + begin, part_rows)
                kept = None
                # One piece is on its way while the next one is made.
                for part in pieces(part_rows, tile_c):
                    z = acc[:, part] * scale if scale != 1.0 else acc[:, part]
                    wide = lambda row, z=z: lax.broadcast_in_dim(row, z.shape, [0])
                    if bias is not None:
                        first = first_column(t) + part.start
                        some = bias_gmem.at[pl.ds(first, z.shape[1])]
                        some = plgpu.load(some, layout=COLUMN, optimized=False)
                        z = z + lax.broadcast_in_dim(some, z.shape, [1])
                    slope = None
                    if softcap is not None:
                        u = capped(z, softcap)
                        z, slope = softcap * u, 1.0 - u * u
                    p = jnp.exp2(z * LOG2E - wide(lse))
                    column = plgpu.broadcasted_iota(
                        jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA
                    )
                    classes = functools.partial(_classes, column, v - t * tile_c - part.start)
                    p = classes(p) if v % tile_c else p
                    kept = p.sum(axis=1) if kept is None else kept + p.sum(axis=1)
                    out = p
                    if not only_p:
                        hit = jnp.where(column == wide(y - part.start), wide(b), 0.0)
                        out = p * wide(a) - hit
                    if slope is not None:
                        out = out * slope
                        if smooth:
                            slope = slope - wide(of_row(kappa_gmem))
                            # What is no class has a class's row of the head, if gathered.
                            slope = classes(slope) if gathered and v % tile_c else slope
                            out = out - wide(of_row(s_gmem)) * slope
                    there = pl.ds(left + part.start, z.shape[1])
                    store(out.astype(dtype), p_smem.at[wg], p_gmem.at[to, there])
                kept_gmem[pl.ds(slot * BLOCK + begin, part_rows)] = kept
                return ring

            every_tile(visit, i32(0))
            plgpu.wait_smem_to_gmem(0)

        run(
            stream,
            dtype,
            tiles=every_tile,
            consume=consume,
            cluster=tiles.cluster > 1,
            scratch={"p_smem": store_stage(part_rows, tile_c, dtype)},
        )

    # What stands in for an absent array is one that is there: a constant would be filled anew in
    # every step of the loop over chunks.
    bias_in = vectors.lse if bias is None else bias
    launch(
        body,
        (),
        ctas=max(ctas // tiles.cluster, 1),
        cluster=tiles.cluster,
        interpret=interpret,
        name="lsce_probabilities",
    )(
        hidden,
        head,
        bias_in,
        *vectors,
        work.items,
        work.first_item,
        work.first_tile,
        work.of_tile,
        work.tile_slot,
        chunk,
        p_ref,
        kept_ref,
    )


def _classes(column, end, x):
    """x, but 0 in columns from `end` on: of the last tile, what is no class."""
    return lax.cond(end < x.shape[1], lambda x: jnp.where(column < end, x, 0.0), lambda x: x, x)


def change_entries(p_ref, row, column, value, *, ctas: int, interpret: Any) -> None:
    """p_ref[row[i], column[i]] = value[i], where row[i] ≥ 0; no two the same, in place."""
    n = row.shape[0]

    def body(row_gmem, column_gmem, value_gmem, p_gmem):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")

        @pl.when(lax.axis_index("wg") == 0)
        def _():
            @pl.loop(0, share(i32(n), num, cta))
            def _(i):
                at = cta + i * num
                row = row_gmem[at]

                @pl.when(row >= 0)
                def _():
                    p_gmem[row, column_gmem[at]] = value_gmem[at].astype(p_ref.dtype)

    launch(body, (), ctas=ctas, interpret=interpret, name="lsce_change_entries")(
        row, column, value, p_ref
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
            row, column = _place(slot_gmem[block, at], panels, tiles.tile_c)
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
    carry: tuple[Any, bool, bool] | None = None,
    after: Any = None,
    panels: int = 1,
    ctas: int,
    interpret: Any,
) -> None:
    """dc_ref [width or V, D] = Pᵀ·E + constant [D] for the columns of a chunk.

    p_ref may be dc_ref, if P lies in rows of other columns.

    `after` is only there to be waited for: where dc_ref replaces something, XLA copies that first
    if it cannot know that its other readers are done.

    `carry` = (low_ref, add, split) sums over calls in more than bfloat16: with `add` the result so
    far, dc_ref + low_ref, is added; with `split` low_ref receives what rounding cuts off dc_ref.
    """
    low_ref, add, split = carry or (constant, False, False)
    within = p_ref is dc_ref
    after = constant if after is None else after
    d_tiles = pl.cdiv(hidden.shape[1], tiles.head_d)
    parts = tiles.tile_c // tiles.head_c
    half_c = tiles.head_c // 2
    per_block = BLOCK // tiles.stage
    # Two CTAs with parts of one column tile read the same hidden states, two with the same columns
    # the same P.
    share_hidden = parts % tiles.cluster == 0
    cluster = tiles.cluster if share_hidden or d_tiles % tiles.cluster == 0 else 1
    shared = "member" if cluster > 1 else None
    dtype = hidden.dtype

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
            inner = lax.rem(k, i32(per_block)) * tiles.stage
            row, column = _place(slot + rank, panels, tiles.tile_c)
            p_rows = pl.ds(row + inner, tiles.stage)
            p_columns = pl.ds(column + part * tiles.head_c, tiles.head_c)
            plgpu.copy_gmem_to_smem(
                (dc_gmem if within else p_gmem).at[p_rows, p_columns],
                a_stage,
                barrier,
                collective_axes=None if share_hidden else shared,
            )
            e_rows = pl.ds(of_tile_gmem[t, rank] * BLOCK + inner, tiles.stage)
            plgpu.copy_gmem_to_smem(
                e_gmem.at[e_rows, pl.ds(dt * tiles.head_d, tiles.head_d)],
                b_stage,
                barrier,
                collective_axes=shared if share_hidden else None,
            )

        stream = Stream(
            steps=tiles.fitting(tiles.head_c + tiles.head_d, (half_c, tiles.head_d)),
            a=(tiles.stage, tiles.head_c),
            b=(tiles.stage, tiles.head_d),
            accumulator=(half_c, tiles.head_d),
            length=lambda tile: tile[4] * per_block,
            copy=copy,
            operands=lambda a, b, wg: (a.at[:, pl.ds(wg * half_c, half_c)].transpose((1, 0)), b),
        )

        def consume(consumer, out_smem):
            wg = consumer.number

            def visit(tile, ring):
                t, part, dt, _, _ = tile
                acc, ring = consumer.multiply(tile, ring)
                columns = pl.ds(dt * tiles.head_d, tiles.head_d)
                row = plgpu.load(constant_gmem.at[columns], layout=COLUMN, optimized=False)
                out = acc + lax.broadcast_in_dim(row, acc.shape, [1])
                first = (t - first_tile if gathered else t) * tiles.tile_c
                first = first + part * tiles.head_c + wg * half_c
                here = pl.ds(first, half_c), columns
                if add:
                    for so_far in (dc_gmem, low_gmem):
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
            dtype,
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
        low_ref,
        after,
    )
