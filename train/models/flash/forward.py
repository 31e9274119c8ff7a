"""o and the log-sum-exp of each query, by an online softmax over the tiles of keys it sees."""

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
from train.models.flash.tiles import LOG2E, STEPS, TILE, Bounds, Scores

NOTHING = -1e30
"""A maximum before there is one: finite, so that the difference of two is 0."""
WIDTH = 128
"""Columns of o that are added at a time: so many registers more than o has."""


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
    shared, width = heads // key.shape[2], min(size, WIDTH)
    parts = [slice(start, start + width) for start in range(0, size, width)]

    def body(q_gmem, k_gmem, v_gmem, first_gmem, o_gmem, lse_gmem, q_smem, lse_smem, stage, ready):
        row, head, tile = this_block()
        at = pl.ds(tile * TILE, TILE)
        plgpu.copy_gmem_to_smem(q_gmem.at[row, at, head], q_smem, ready)
        first = plgpu.load(first_gmem.at[row, at], layout=ROW, optimized=False)
        begin, tiles = tiles_of_keys(first_gmem, row, tile)
        plgpu.barrier_wait(ready)

        def step(index, k_smem, v_smem, carry):
            acc, most, total = carry

            s, _ = scores.in_bits(_product(q_smem, k_smem.T))
            s = jnp.where(seen_by_rows(tile, begin + index[0], first), s, -jnp.inf)
            new = jnp.maximum(most, s.max(axis=1))
            p = jnp.exp2(s - along(new, 0))
            shrunk = jnp.exp2(most - new)
            total = total * shrunk + p.sum(axis=1)
            p = factor(p, v_smem.dtype, stage)
            acc = tuple(
                part * along(shrunk, 0, width) + _product(p, v_smem.at[:, columns])
                for part, columns in zip(acc, parts, strict=True)
            )
            return acc, new, total

        start = (
            tuple(
                plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), plgpu.Layout.WGMMA)
                for _ in parts
            ),
            plgpu.layout_cast(jnp.full((TILE,), NOTHING, jnp.float32), ROW),
            plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROW),
        )
        keys = tile_spec(size, lambda i: (row, begin + i, lax.div(head, jnp.int32(shared))))
        acc, most, total = plgpu.emit_pipeline(
            step,
            grid=(tiles,),
            in_specs=[keys, keys],
            max_concurrent_steps=STEPS,
            init_carry=start,
        )(k_gmem, v_gmem)

        for part, columns in zip(acc, parts, strict=True):
            q_smem[:, columns] = (part * along(1.0 / total, 0, width)).astype(q_smem.dtype)
        lse_smem[...] = most + jnp.log(total) * LOG2E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, o_gmem.at[row, at, head])
        plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[row, head, at])
        plgpu.wait_smem_to_gmem(0)

    return launch(
        body,
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ),
        name="packed_attention",
        grid=(heads, length // TILE, rows),
        scratch=[
            smem_tile((TILE, size), query.dtype),
            plgpu.SMEM((TILE,), jnp.float32),
            factor_stage(scores.interpret, query.dtype),
            plgpu.Barrier(),
        ],
        interpret=scores.interpret,
    )(query, key, value, seen.first)


def _product(a, b):
    def multiply(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE, b.shape[1]), jnp.float32))
