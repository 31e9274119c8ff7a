"""The frame of attention's kernels: a thread block for each tile of a head, and what it visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lsce.backends.hopper.kernels.pipeline import i32, smem_tile
from train.models.flash.tiles import STEPS, TILE, Scores

AXES = "head", "tile", "row"
"""Of a grid; heads that share keys come one after the other."""


def launch(
    body: Callable[..., None],
    out_type: Any,
    *,
    name: str,
    grid: tuple[int, int, int],
    scratch: dict[str, Any],
    interpret: Any,
):
    """The kernel of one warpgroup for each point of the grid."""
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=AXES,
        scratch_types=scratch,
        # Sums along a row stay inside a warp: they take no scratch.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **({} if interpret is None else {"interpret": interpret}),
    )


def this_block():
    """Row, head and tile of a thread block."""
    return lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")


def stages(size: int, dtype):
    """Room for `STEPS` tiles of H columns."""
    return smem_tile((TILE, size), dtype, STEPS)


def arrivals(copies: int):
    """Of so many copies in each stage."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=STEPS)


def walk(
    count,
    load: Callable[[Any, Any], None],
    visit: Callable[[Any, Any, Any], Any],
    arrived,
    meanwhile: Callable[[], Any],
):
    """carry = visit(i, stage, carry) for i = 0 … count − 1, each when its tiles have arrived.

    load(i, stage) has what is copied there arrive at `arrived.at[stage]`, `STEPS` − 1 visits ahead.
    `meanwhile` gives the first carry while the first tiles are on their way. `visit` must leave no
    product unfinished.
    """
    for first in range(STEPS):

        @pl.when(first < count)
        def _(i=first):
            load(i32(i), i)

    def step(i, carry):
        stage = lax.rem(i, i32(STEPS))
        plgpu.barrier_wait(arrived.at[stage])
        carry = visit(i, stage, carry)

        @pl.when(i + STEPS < count)
        def _():
            load(i + STEPS, stage)

        return carry

    return lax.fori_loop(0, count, step, meanwhile())


def tiles_of_keys(first_gmem, row, tile):
    """The first tile of keys that a tile of queries meets, and how many: its own is the last."""
    begin = lax.div(first_gmem[row, tile * TILE], i32(TILE))
    return begin, tile + 1 - begin


def tiles_of_queries(end_gmem, row, tile):
    """How many tiles of queries a tile of keys meets, from its own on."""
    return lax.div(end_gmem[row, tile * TILE + (TILE - 1)] - 1, i32(TILE)) + 1 - tile


def seen(query_tile, key_tile, first, *, keys_down: bool):
    """Which keys the queries of two tiles see, `first` being each query's first."""
    query = query_tile * TILE + _iota(int(keys_down))
    key = key_tile * TILE + _iota(int(not keys_down))
    return (key <= query) & (key >= along(first, int(keys_down)))


def _iota(axis: int):
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)


def along(x, axis: int, columns: int = TILE):
    """A vector of a tile's rows, or columns, at each of its entries."""
    return lax.broadcast_in_dim(x, (TILE, columns), [axis])


def product(a, b):
    """a·b for a tile's rows, in float32."""

    def multiply(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(multiply, accumulator(b.shape[1]))


def plus_product(sums, a, b, scores: Scores):
    """sums + a·b, where the sums are. The interpreter (jax 0.11.2) cannot add in place."""
    if scores.interpret is not None:
        return sums + product(a, b)

    def add(ref):
        plgpu.wgmma(ref, a, b)

    return pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(sums))


def accumulator(columns: int):
    return plgpu.WGMMAAccumulatorRef((TILE, columns), jnp.float32)


def factor(value, dtype, stage):
    """A left factor of a product, straight from the registers, or through a stage."""
    if stage is None:
        return value.astype(dtype)
    stage[...] = value.astype(dtype)
    return stage


def factor_stage(scores: Scores, dtype):
    """None, but for the interpreter (jax 0.11.2), which knows no left factor in registers."""
    return None if scores.interpret is None else plgpu.SMEM((TILE, TILE), dtype)
