"""The softmax terms of chosen tiles, which both products of the backward pass use.

For a chunk of columns, gathered or in place:

    P = (a·p − b·1[c = y])·J − s·(J − κ)      only the active (block of tokens, column tile) pairs

P is bfloat16 in one buffer that every chunk reuses; what is not active there is never read. Its
tiles lie one below the other, or `panels` of them side by side in a wider array.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce.backends.hopper.kernels.lse_forward import LOG2E, capped
from lsce.backends.hopper.kernels.pipeline import (
    COLUMN,
    ROW,
    Stream,
    epilogue_columns,
    i32,
    launch,
    run,
    share,
    store,
    store_stage,
)
from lsce.backends.hopper.tiles import BackwardTiles
from lsce.sparse.plan import Work
from lsce.sparse.tokens import BLOCK

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


def p_address(slot, panels: int, tile_c: int):
    """Row and column of P's buffer at which a tile of P begins."""
    if panels == 1:
        return slot * BLOCK, i32(0)
    return lax.div(slot, i32(panels)) * BLOCK, lax.rem(slot, i32(panels)) * tile_c


@functools.partial(
    jax.jit,
    static_argnames=(
        "tiles",
        "gathered",
        "scale",
        "softcap",
        "smooth",
        "v",
        "panels",
        "only_p",
        "ctas",
        "interpret",
    ),
)
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
                first_row, left = p_address(slot, panels, tile_c)
                to = pl.ds(first_row + begin, part_rows)
                kept = None
                # Some columns are on their way while the next ones are made.
                for part in epilogue_columns(part_rows, tile_c):
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
