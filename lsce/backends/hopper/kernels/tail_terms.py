"""The tail's terms in 8 bits, in the two orders that its two products need (`lsce.sparse.tail`).

    T₈ = e4m3((a·p·J − s·(J − κ))·r)      0 in the (block of tokens, column) pairs kept in 16 bits

An 8-bit product takes both operands with the summed index last: dE wants T₈ by columns, dC by
tokens. Nothing transposes bytes on Hopper, but `stmatrix` does transpose words of 16 bits. So two
tokens make a word, 64 apart because one thread owns both; in the second order the tokens of a block
are therefore those of `interleaved`.

The two consumers of a CTA have the same tokens and neighbouring halves of a column tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from lsce.backends.hopper.kernels.lse_forward import LOG2E, LOWEST, capped
from lsce.backends.hopper.kernels.pipeline import (
    COLUMN,
    ROW,
    Stream,
    i32,
    launch,
    run,
    share,
    smem_tile,
    swizzled,
)
from lsce.backends.hopper.kernels.probabilities import HALF
from lsce.backends.hopper.tiles import CONSUMERS, BackwardTiles
from lsce.sparse.plan import Work
from lsce.sparse.tail import E4M3, e4m3
from lsce.sparse.tokens import BLOCK

NO_CLASS = 2 * LOWEST
"""Of a column that adds nothing: less than any logit, which is no less than LOWEST."""
AT_A_TIME = 64
"""Columns of a consumer's tile that are on their way out at a time."""


class Terms(NamedTuple):
    """What makes a term of a product of E₈ and C₈.

    Without a softcap log2 p = unit·product + column + row; with one, unit·product + column + row is
    the logit below the cap, in nats.
    """

    unit: Float[Array, " 1"]
    most: Float[Array, " 1"]
    """log2 ε: no p of the tail is more."""
    column: Float[Array, " columns"]
    """Of the columns of all chunks, finite; `NO_CLASS` behind the last class. Not of a chunk: XLA
    would slice them in one thunk with the kernel, and that thunk does not know that the kernel
    writes into what it is given."""
    row: Float[Array, " rows"]
    lse: Float[Array, " rows"]
    """In log2 units; under a softcap only."""
    a: Float[Array, " rows"]
    """Factor of the probabilities, r included."""
    s: Float[Array, " rows"]
    """Smoothing a column, r included; under a softcap only."""
    kappa: Float[Array, " rows"]


def interleaved(x: Array) -> Array:
    """The rows of x [rows, …] as the second order has a block's tokens: 0, 64, 1, 65, …"""
    return x.reshape(-1, 2, HALF, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("tiles", "softcap", "smooth", "ctas", "interpret"))
def tail_terms(
    e8,
    c8,
    terms: Terms,
    kept: Int[Array, "groups columns"],
    work: Work,
    chunk,
    t_ref,
    transposed_ref,
    mass_ref,
    *,
    tiles: BackwardTiles,
    softcap: float | None,
    smooth: bool,
    ctas: int,
    interpret: Any,
) -> None:
    """Writes T₈ of a chunk's tiles, c8 [columns, D] being the chunk's rows of the head.

    t_ref is [slots · BLOCK, tile_c], transposed_ref [slots · tile_c, BLOCK], and under a softcap
    mass_ref [2 · slots · BLOCK] receives each row's Σ T·r in both halves of a tile. `kept` says
    which columns are none of the tail's: a bit a block, 32 of them a word.
    """
    blocks = e8.shape[0] // BLOCK
    tile_c, half_c = tiles.tile_c, tiles.tile_c // CONSUMERS
    stage = 2 * tiles.stage  # as many bytes as of 16 bits
    k_iters = pl.cdiv(e8.shape[1], stage)
    shared = "member" if tiles.cluster > 1 else None

    def body(
        e_gmem,
        c_gmem,
        unit_gmem,
        most_gmem,
        column_gmem,
        row_gmem,
        lse_gmem,
        a_gmem,
        s_gmem,
        kappa_gmem,
        kept_gmem,
        item_gmem,
        first_item_gmem,
        first_tile_gmem,
        slot_gmem,
        chunk_gmem,
        t_gmem,
        transposed_gmem,
        mass_gmem,
    ):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")
        member = lax.axis_index("member") if tiles.cluster > 1 else i32(0)
        chunk = chunk_gmem[0]
        first_item, first_tile = first_item_gmem[chunk], first_tile_gmem[chunk]

        def every_tile(visit, carry):
            def item(i, carry):
                code = item_gmem[first_item + cta + i * num]
                tile = lax.div(code, i32(blocks)), lax.rem(code, i32(blocks)) + member
                return visit(tile, carry)

            mine = share(first_item_gmem[chunk + 1] - first_item, num, cta)
            return lax.fori_loop(0, mine, item, carry)

        def copy(tile, k, a_stage, b_stage, barrier):
            t, block = tile
            ks = pl.ds(k * stage, stage)
            plgpu.copy_gmem_to_smem(e_gmem.at[pl.ds(block * BLOCK, BLOCK), ks], a_stage, barrier)
            columns = pl.ds((t - first_tile) * tile_c, tile_c)
            plgpu.copy_gmem_to_smem(
                c_gmem.at[columns, ks], b_stage, barrier, collective_axes=shared
            )

        stream = Stream(
            steps=tiles.fitting(BLOCK + tile_c, (BLOCK, AT_A_TIME)),
            a=(BLOCK, stage),
            b=(tile_c, stage),
            accumulator=(BLOCK, half_c),
            length=lambda _: i32(k_iters),
            copy=copy,
            operands=lambda a, b, wg: (a, b.at[pl.ds(wg * half_c, half_c)].transpose((1, 0))),
        )

        def consume(consumer, t_smem, transposed_smem):
            wg = consumer.number

            def visit(tile, ring):
                t, block = tile
                rows = pl.ds(block * BLOCK, BLOCK)
                of_row = lambda ref: plgpu.load(ref.at[rows], layout=ROW, optimized=False)
                unit, most = unit_gmem[0], most_gmem[0]
                row, a = of_row(row_gmem), of_row(a_gmem)
                word, bit = lax.div(block, i32(32)), i32(1) << lax.rem(block, i32(32))
                acc, ring = consumer.multiply(tile, ring)
                slot, left = slot_gmem[t] + block, wg * half_c
                mass = None
                for start in range(0, half_c, AT_A_TIME):
                    x = acc[:, start : start + AT_A_TIME] * unit
                    wide = lambda row, x=x: lax.broadcast_in_dim(row, x.shape, [0])
                    columns = pl.ds(t * tile_c + left + start, AT_A_TIME)
                    of_column = lambda ref: plgpu.load(ref, layout=COLUMN, optimized=False)
                    elsewhere = (of_column(kept_gmem.at[word, columns]) & bit) != 0
                    column = jnp.where(elsewhere, NO_CLASS, of_column(column_gmem.at[columns]))
                    column = lax.broadcast_in_dim(column, x.shape, [1])
                    x = x + column + wide(row)
                    if softcap is None:
                        out = jnp.exp2(jnp.minimum(x, most)) * wide(a)
                    else:
                        u = capped(x, softcap)
                        slope = 1.0 - u * u
                        x = softcap * LOG2E * u - wide(of_row(lse_gmem))
                        out = jnp.exp2(jnp.minimum(x, most)) * wide(a) * slope
                        if smooth:
                            change = slope - wide(of_row(kappa_gmem))
                            out = out - wide(of_row(s_gmem)) * change
                        # The cap makes a logit of any column.
                        out = jnp.where(column >= LOWEST, out, 0.0)
                        mass = out.sum(axis=1) if mass is None else mass + out.sum(axis=1)
                    columns = pl.ds(left + start, AT_A_TIME)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    t_smem[wg] = out.astype(E4M3)  # r has made them no more than the largest
                    store_transposed(out, transposed_smem.at[wg], interpret=interpret is not None)
                    plgpu.commit_smem()
                    tokens = pl.ds(slot * BLOCK, BLOCK)
                    plgpu.copy_smem_to_gmem(t_smem.at[wg], t_gmem.at[tokens, columns])
                    columns = pl.ds(slot * tile_c + left + start, AT_A_TIME)
                    plgpu.copy_smem_to_gmem(transposed_smem.at[wg], transposed_gmem.at[columns])
                if mass is not None:
                    mass_gmem[pl.ds((slot * CONSUMERS + wg) * BLOCK, BLOCK)] = mass
                return ring

            every_tile(visit, i32(0))
            plgpu.wait_smem_to_gmem(0)

        run(
            stream,
            E4M3,
            tiles=every_tile,
            consume=consume,
            cluster=tiles.cluster > 1,
            scratch={
                "t_smem": smem_tile((CONSUMERS, BLOCK, AT_A_TIME), E4M3),
                "transposed_smem": smem_tile((CONSUMERS, AT_A_TIME, BLOCK), E4M3),
            },
        )

    launch(
        body,
        (),
        ctas=max(ctas // tiles.cluster, 1),
        cluster=tiles.cluster,
        interpret=interpret,
        name="lsce_tail_terms",
    )(
        e8,
        c8,
        *terms,
        kept,
        work.items,
        work.first_item,
        work.first_tile,
        work.tile_slot,
        chunk,
        t_ref,
        transposed_ref,
        mass_ref,
    )


def store_transposed(x, stage, *, interpret: bool) -> None:
    """stage [columns, BLOCK] = the e4m3 of x [BLOCK, columns], its tokens interleaved."""
    if interpret:
        stage[...] = interleaved(e4m3(x)).swapaxes(0, 1)
        return
    swizzle = BLOCK  # bytes, of rows that are as long
    kind: Any = plgpu.RefType(swizzled(BLOCK))
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, kind))

    @inline
    def device_store(_, x, stage):
        i16 = ir.IntegerType.get_signless(16)
        at = lambda reg, i: vector.extract(
            reg, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
        )
        low, high = x[:HALF], x[HALF:]
        words = np.empty_like(low.registers)
        for i, register in np.ndenumerate(low.registers):
            pair = [
                llvm.inline_asm(
                    i16,
                    [at(high.registers[i], c), at(register, c)],
                    "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;",  # the first in the high byte
                    "=h,f,f",
                )
                for c in range(2)
            ]
            words[i] = vector.from_elements(ir.VectorType.get((2,), i16), pair)
        words = fa.FragmentedArray(_registers=words, _layout=fa.WGMMA_LAYOUT, _is_signed=False)
        given = ir.MemRefType(stage.type)
        *tiles, width = given.shape
        kind = ir.MemRefType.get((*tiles, width // 2), i16, None, given.memory_space)
        as_words = mgpu_utils.ptr_as_memref(mgpu_utils.memref_ptr(stage), kind)
        words.store_tiled(mgpu_utils.memref_transpose(as_words, (1, 0, 3, 2)), swizzle)

    device_store(x, stage)
