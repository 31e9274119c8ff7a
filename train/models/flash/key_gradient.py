"""dK and dV, summed over the queries that see a key, of all heads that share it, in their order.

dV = pᵀ·do,    dK = scale · dsᵀ·q
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsce.backends.hopper.kernels.pipeline import COLUMN, smem_tile
from train.models.flash.kernel import (
    along,
    factor,
    factor_stage,
    launch,
    seen_by_columns,
    this_block,
    tile_spec,
    tiles_of_queries,
)
from train.models.flash.tiles import STEPS, TILE, Bounds, Scores

MOST_OF_BOTH = 128
"""Head size up to which the registers hold both sums: above it p is made twice."""


@functools.partial(jax.jit, static_argnames="scores")
def key_gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    seen: Bounds,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    gradient: Float[Array, "B T N H"],
    scores: Scores,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """dK and dV."""
    given = query, key, value, seen, lse, delta, gradient, scores
    if query.shape[-1] <= MOST_OF_BOTH:
        dk, dv = _gradients(*given, of=("key", "value"))
        return dk, dv
    return _gradients(*given, of=("key",))[0], _gradients(*given, of=("value",))[0]


def _gradients(query, key, value, seen, lse, delta, gradient, scores, *, of):
    rows, length, heads, size = query.shape
    shared = heads // key.shape[2]
    of_key, of_value = "key" in of, "value" in of

    def body(q_gmem, k_gmem, v_gmem, first_gmem, end_gmem, lse_gmem, delta_gmem, do_gmem, *rest):
        *out_gmems, k_smem, v_smem, stage, ready = rest
        row, shared_head, tile = this_block()
        at = pl.ds(tile * TILE, TILE)
        plgpu.copy_gmem_to_smem(k_gmem.at[row, at, shared_head], k_smem, ready)
        plgpu.copy_gmem_to_smem(v_gmem.at[row, at, shared_head], v_smem, ready)
        tiles = tiles_of_queries(end_gmem, row, tile)
        plgpu.barrier_wait(ready)

        def accumulate(*refs):
            refs = dict(zip(of, refs, strict=True))

            def step(index, q_smem, do_smem, lse_smem, delta_smem, first_smem):
                lse, delta, first = (
                    plgpu.load(ref, layout=COLUMN) for ref in (lse_smem, delta_smem, first_smem)
                )

                def products(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, k_smem, q_smem.T)
                    if of_key:
                        plgpu.wgmma(dp_ref, v_smem, do_smem.T)
                    return s_ref[...], dp_ref[...] if of_key else None

                square = plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32)
                s, dp = pl.run_scoped(products, square, square if of_key else None)
                s, slope = scores.in_bits(s)
                p = jnp.exp2(s - along(lse, 1))
                p = jnp.where(seen_by_columns(tile + index[1], tile, first), p, 0.0)
                if of_value:
                    plgpu.wgmma(refs["value"], factor(p, do_smem.dtype, stage), do_smem)
                if of_key:
                    ds = p * (dp - along(delta, 1))
                    if slope is not None:
                        ds *= slope
                    plgpu.wgmma(refs["key"], factor(ds, q_smem.dtype, stage), q_smem)
                plgpu.wgmma_wait(0)

            def head_of(i):
                return shared_head * shared + i

            queries = tile_spec(size, lambda i, j: (row, tile + j, head_of(i)))
            by_head = plgpu.BlockSpec((None, None, TILE), lambda i, j: (row, head_of(i), tile + j))
            plgpu.emit_pipeline(
                step,
                grid=(jnp.int32(shared), tiles),
                in_specs=[
                    queries,
                    queries,
                    by_head,
                    by_head,
                    plgpu.BlockSpec((None, TILE), lambda i, j: (row, tile + j)),
                ],
                max_concurrent_steps=STEPS,
            )(q_gmem, do_gmem, lse_gmem, delta_gmem, first_gmem)
            return tuple(ref[...] for ref in refs.values())

        sum_of = plgpu.WGMMAAccumulatorRef((TILE, size), jnp.float32)
        sums = pl.run_scoped(accumulate, *[sum_of] * len(of))
        smems = {"key": k_smem, "value": v_smem}
        for which, total, out_gmem in zip(of, sums, out_gmems, strict=True):
            if which == "key":
                total *= scores.scale
            smems[which][...] = total.astype(key.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smems[which], out_gmem.at[row, at, shared_head])
        plgpu.wait_smem_to_gmem(0)

    tile = smem_tile((TILE, size), key.dtype)
    return launch(
        body,
        (jax.ShapeDtypeStruct(key.shape, key.dtype),) * len(of),
        name="packed_attention_d" + "".join(which[0] for which in of),
        grid=(key.shape[2], length // TILE, rows),
        scratch=[
            tile,
            tile,
            factor_stage(scores.interpret, key.dtype),
            plgpu.Barrier(num_arrivals=2),
        ],
        interpret=scores.interpret,
    )(query, key, value, seen.first, seen.end, lse, delta, gradient)
