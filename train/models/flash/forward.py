"""o and the log-sum-exp of each query, by an online softmax over the tiles of keys it sees."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsce.backends.hopper.kernels.pipeline import ROW, i32, smem_tile
from train.models.flash import kernel
from train.models.flash.kernel import along, factor, product
from train.models.flash.tiles import LOG2E, TILE, Bounds, Scores

NOTHING = -1e30
"""A maximum before there is one: finite, so that the difference of two is 0."""


@functools.partial(jax.jit, static_argnames="scores")
def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    seen: Bounds,
    scores: Scores,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """T must be a multiple of `TILE`. The log-sum-exp is in units of log 2."""
    rows, length, heads, size = query.shape
    shared = heads // key.shape[2]

    def body(
        q_gmem,
        k_gmem,
        v_gmem,
        first_gmem,
        o_gmem,
        lse_gmem,
        *,
        q_smem,
        k_smem,
        v_smem,
        lse_smem,
        stage_smem,
        ready,
        arrived,
    ):
        row, head, tile = kernel.this_block()
        at, shared_head = pl.ds(tile * TILE, TILE), lax.div(head, i32(shared))
        plgpu.copy_gmem_to_smem(q_gmem.at[row, at, head], q_smem, ready)
        begin, tiles = kernel.tiles_of_keys(first_gmem, row, tile)

        def load(i, stage):
            keys = row, pl.ds((begin + i) * TILE, TILE), shared_head
            plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem.at[stage], arrived.at[stage])
            plgpu.copy_gmem_to_smem(v_gmem.at[keys], v_smem.at[stage], arrived.at[stage])

        def meanwhile():
            first = plgpu.load(first_gmem.at[row, at], layout=ROW, optimized=False)
            plgpu.barrier_wait(ready)
            sums = plgpu.layout_cast(jnp.zeros((TILE, size), jnp.float32), plgpu.Layout.WGMMA)
            most, total = (jnp.full((TILE,), x, jnp.float32) for x in (NOTHING, 0.0))
            return sums, plgpu.layout_cast(most, ROW), plgpu.layout_cast(total, ROW), first

        def visit(i, stage, carry):
            sums, most, total, first = carry
            s, _ = scores.in_bits(product(q_smem, k_smem.at[stage].T))
            s = jnp.where(kernel.seen(tile, begin + i, first, keys_down=False), s, -jnp.inf)
            new = jnp.maximum(most, s.max(axis=1))
            p = jnp.exp2(s - along(new, 0))
            shrunk = jnp.exp2(most - new)
            total = total * shrunk + p.sum(axis=1)
            p = factor(p, value.dtype, stage_smem)
            sums = kernel.plus_product(sums * along(shrunk, 0, size), p, v_smem.at[stage], scores)
            return sums, new, total, first

        sums, most, total, _ = kernel.walk(tiles, load, visit, arrived, meanwhile)
        q_smem[...] = (sums * along(1.0 / total, 0, size)).astype(q_smem.dtype)
        lse_smem[...] = most + jnp.log(total) * LOG2E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, o_gmem.at[row, at, head])
        plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[row, head, at])
        plgpu.wait_smem_to_gmem(0)

    return kernel.launch(
        body,
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ),
        name="packed_attention",
        grid=(heads, length // TILE, rows),
        scratch={
            "q_smem": smem_tile((TILE, size), query.dtype),
            "k_smem": kernel.stages(size, key.dtype),
            "v_smem": kernel.stages(size, value.dtype),
            "lse_smem": plgpu.SMEM((TILE,), jnp.float32),
            "stage_smem": kernel.factor_stage(scores, value.dtype),
            "ready": plgpu.Barrier(),
            "arrived": kernel.arrivals(2),
        },
        interpret=scores.interpret,
    )(query, key, value, seen.first)
