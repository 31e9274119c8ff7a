"""dK and dV, summed over the queries that see a key, of all heads that share it, in their order.

dV = pᵀ·do,    dK = scale · dsᵀ·q
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsce.backends.hopper.kernels.pipeline import COLUMN, smem_tile
from train.models.flash import kernel
from train.models.flash.kernel import along, factor
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
        dk, dv = _gradients(*given, of=("k", "v"))
        return dk, dv
    return _gradients(*given, of=("k",))[0], _gradients(*given, of=("v",))[0]


def _gradients(query, key, value, seen, lse, delta, gradient, scores, *, of):
    rows, length, heads, size = query.shape
    shared = heads // key.shape[2]

    def body(
        q_gmem,
        k_gmem,
        v_gmem,
        first_gmem,
        end_gmem,
        lse_gmem,
        delta_gmem,
        do_gmem,
        *out_gmems,
        k_smem,
        v_smem,
        q_smem,
        do_smem,
        lse_smem,
        delta_smem,
        first_smem,
        stage_smem,
        ready,
        arrived,
    ):
        row, shared_head, tile = kernel.this_block()
        at = pl.ds(tile * TILE, TILE)
        plgpu.copy_gmem_to_smem(k_gmem.at[row, at, shared_head], k_smem, ready)
        plgpu.copy_gmem_to_smem(v_gmem.at[row, at, shared_head], v_smem, ready)
        tiles = kernel.tiles_of_queries(end_gmem, row, tile)

        def load(i, stage):
            head = shared_head * shared + lax.div(i, tiles)
            queries = pl.ds((tile + lax.rem(i, tiles)) * TILE, TILE)
            for gmem, smem in (
                (q_gmem.at[row, queries, head], q_smem),
                (do_gmem.at[row, queries, head], do_smem),
                (lse_gmem.at[row, head, queries], lse_smem),
                (delta_gmem.at[row, head, queries], delta_smem),
                (first_gmem.at[row, queries], first_smem),
            ):
                plgpu.copy_gmem_to_smem(gmem, smem.at[stage], arrived.at[stage])

        def meanwhile():
            plgpu.barrier_wait(ready)
            return ()

        def accumulate(*refs):
            sums = dict(zip(of, refs, strict=True))

            def visit(i, stage, carry):
                lse, delta, first = (
                    plgpu.load(smem.at[stage], layout=COLUMN)
                    for smem in (lse_smem, delta_smem, first_smem)
                )

                def products(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, k_smem, q_smem.at[stage].T)
                    if "k" in of:
                        plgpu.wgmma(dp_ref, v_smem, do_smem.at[stage].T)
                    return s_ref[...], dp_ref[...] if "k" in of else None

                square = kernel.accumulator(TILE)
                s, dp = pl.run_scoped(products, square, square if "k" in of else None)
                s, slope = scores.in_bits(s)
                p = jnp.exp2(s - along(lse, 1))
                queries = tile + lax.rem(i, tiles)
                p = jnp.where(kernel.seen(queries, tile, first, keys_down=True), p, 0.0)
                if "v" in of:
                    p_factor = factor(p, gradient.dtype, stage_smem)
                    plgpu.wgmma(sums["v"], p_factor, do_smem.at[stage])
                if "k" in of:
                    ds = p * (dp - along(delta, 1))
                    if slope is not None:
                        ds *= slope
                    plgpu.wgmma(sums["k"], factor(ds, query.dtype, stage_smem), q_smem.at[stage])
                plgpu.wgmma_wait(0)
                return carry

            kernel.walk(shared * tiles, load, visit, arrived, meanwhile)
            return tuple(ref[...] for ref in refs)

        totals = pl.run_scoped(accumulate, *[kernel.accumulator(size)] * len(of))
        for which, total, gmem in zip(of, totals, out_gmems, strict=True):
            smem = k_smem if which == "k" else v_smem
            smem[...] = (total * scores.scale if which == "k" else total).astype(key.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, gmem.at[row, at, shared_head])
        plgpu.wait_smem_to_gmem(0)

    vectors = plgpu.SMEM((STEPS, TILE), jnp.float32)
    return kernel.launch(
        body,
        (jax.ShapeDtypeStruct(key.shape, key.dtype),) * len(of),
        name=f"packed_attention_d{''.join(of)}",
        grid=(key.shape[2], length // TILE, rows),
        scratch={
            **dict.fromkeys(("k_smem", "v_smem"), smem_tile((TILE, size), key.dtype)),
            **dict.fromkeys(("q_smem", "do_smem"), kernel.stages(size, query.dtype)),
            **dict.fromkeys(("lse_smem", "delta_smem"), vectors),
            "first_smem": plgpu.SMEM((STEPS, TILE), jnp.int32),
            "stage_smem": kernel.factor_stage(scores, query.dtype),
            "ready": plgpu.Barrier(num_arrivals=2),
            "arrived": kernel.arrivals(5),
        },
        interpret=scores.interpret,
    )(query, key, value, seen.first, seen.end, lse, delta, gradient)
