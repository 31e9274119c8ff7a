"""dQ, and of each query δ = Σ_h o·do, which the gradients of the scores have in common.

ds = p · (do·vᵀ − δ),    dQ = scale · ds·k,    under a softcap with ds · (1 − tanh²)
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsce.backends.hopper.kernels.pipeline import ROW, smem_tile
from train.models.flash.kernel import (
    along,
    factor,
    factor_stage,
    launch,
    seen_by_rows,
    this_block,
    tile_spec,
    tiles_of_keys,
)
from train.models.flash.tiles import STEPS, TILE, Bounds, Scores


@functools.partial(jax.jit, static_argnames="scores")
def query_gradient(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    seen: Bounds,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    gradient: Float[Array, "B T N H"],
    scores: Scores,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """dQ and δ."""
    rows, length, heads, size = query.shape
    shared = heads // key.shape[2]

    def body(
        q_gmem,
        k_gmem,
        v_gmem,
        first_gmem,
        o_gmem,
        lse_gmem,
        do_gmem,
        dq_gmem,
        delta_gmem,
        q_smem,
        o_smem,
        do_smem,
        delta_smem,
        stage,
        ready,
    ):
        row, head, tile = this_block()
        at = pl.ds(tile * TILE, TILE)
        for gmem, smem in ((q_gmem, q_smem), (o_gmem, o_smem), (do_gmem, do_smem)):
            plgpu.copy_gmem_to_smem(gmem.at[row, at, head], smem, ready)
        first = plgpu.load(first_gmem.at[row, at], layout=ROW, optimized=False)
        lse = plgpu.load(lse_gmem.at[row, head, at], layout=ROW, optimized=False)
        begin, tiles = tiles_of_keys(first_gmem, row, tile)
        plgpu.barrier_wait(ready)
        delta = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROW)
        for start in range(0, size, TILE):
            part = slice(start, start + TILE)
            o, do = (
                plgpu.load(ref.at[:, part], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                for ref in (o_smem, do_smem)
            )
            delta += (o * do).sum(axis=1)
        delta_smem[...] = delta
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(delta_smem, delta_gmem.at[row, head, at])

        def accumulate(dq_ref):
            def step(index, k_smem, v_smem):
                def products(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, q_smem, k_smem.T)
                    plgpu.wgmma(dp_ref, do_smem, v_smem.T)
                    return s_ref[...], dp_ref[...]

                square = plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32)
                s, dp = pl.run_scoped(products, square, square)
                s, slope = scores.in_bits(s)
                p = jnp.exp2(s - along(lse, 0))
                p = jnp.where(seen_by_rows(tile, begin + index[0], first), p, 0.0)
                ds = p * (dp - along(delta, 0))
                if slope is not None:
                    ds *= slope
                plgpu.wgmma(dq_ref, factor(ds, k_smem.dtype, stage), k_smem)
                plgpu.wgmma_wait(0)

            keys = tile_spec(size, lambda i: (row, begin + i, lax.div(head, jnp.int32(shared))))
            plgpu.emit_pipeline(
                step,
                grid=(tiles,),
                in_specs=[keys, keys],
                max_concurrent_steps=STEPS,
            )(k_gmem, v_gmem)
            return dq_ref[...]

        dq = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((TILE, size), jnp.float32))
        q_smem[...] = (dq * scores.scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_gmem.at[row, at, head])
        plgpu.wait_smem_to_gmem(0)

    tile = smem_tile((TILE, size), query.dtype)
    return launch(
        body,
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ),
        name="packed_attention_dq",
        grid=(heads, length // TILE, rows),
        scratch=[
            tile,
            tile,
            tile,
            plgpu.SMEM((TILE,), jnp.float32),
            factor_stage(scores.interpret, query.dtype),
            plgpu.Barrier(num_arrivals=3),
        ],
        interpret=scores.interpret,
    )(query, key, value, seen.first, out, lse, gradient)
