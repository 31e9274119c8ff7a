"""The frame of attention's kernels: a thread block for each tile of a head, and what it visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lsce.backends.hopper.kernels.pipeline import swizzled
from train.models.flash.tiles import TILE

AXES = "head", "tile", "row"
"""Of a grid; heads that share keys come one after the other."""


def launch(
    body: Callable[..., None],
    out_type: Any,
    *,
    name: str,
    grid: tuple[int, int, int],
    scratch: Sequence[Any],
    interpret: Any,
):
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=AXES,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )


def this_block():
    """Row, head and tile of a thread block."""
    return lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")


def factor(value, dtype, stage):
    """A left factor of a product, straight from the registers, or through a stage."""
    if stage is None:
        return value.astype(dtype)
    stage[...] = value.astype(dtype)
    return stage


def factor_stage(interpret: Any, dtype):
    """None, but for the interpreter (jax 0.11.2), which knows no left factor in registers."""
    return None if interpret is None else plgpu.SMEM((TILE, TILE), dtype)


def tile_spec(size: int, index: Callable[..., tuple[Any, Any, Any]]):
    """Tiles of [B, T, heads, H]; `index` gives row, tile and head of a step."""

    def where(*step):
        row, tile, head = index(*step)
        return row, tile, head, jnp.int32(0)

    return plgpu.BlockSpec((None, TILE, None, size), where, transforms=swizzled(2 * size, 2))


def tiles_of_keys(first_gmem, row, tile):
    """The first tile of keys that a tile of queries meets, and how many: its own is the last."""
    begin = lax.div(first_gmem[row, tile * TILE], jnp.int32(TILE))
    return begin, tile + 1 - begin


def tiles_of_queries(end_gmem, row, tile):
    """How many tiles of queries a tile of keys meets, from its own on."""
    end = end_gmem[row, tile * TILE + (TILE - 1)]
    return lax.div(end + jnp.int32(TILE - 1), jnp.int32(TILE)) - tile


def seen_by_rows(query_tile, key_tile, first):
    """Which of a tile's queries, down, see which keys, across."""
    query = query_tile * TILE + _iota(0)
    key = key_tile * TILE + _iota(1)
    return (key <= query) & (key >= along(first, 0))


def seen_by_columns(query_tile, key_tile, first):
    """The same, with keys down and queries across."""
    query = query_tile * TILE + _iota(1)
    key = key_tile * TILE + _iota(0)
    return (key <= query) & (key >= along(first, 1))


def along(x, axis: int, columns: int = TILE):
    """A vector of a tile's rows, or columns, at each of its entries."""
    return lax.broadcast_in_dim(x, (TILE, columns), [axis])


def _iota(axis: int):
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)
