"""The kernels on a CPU, for tests."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from lsce.backends.hopper.tiles import BackwardTiles, ForwardTiles, Tiles

active: tuple[Any, Tiles] | None = None
"""Parameters and tiles of the interpreter, where calls are to run in it."""
CTAS = 2


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False, tiles: Tiles | None = None) -> Iterator[None]:
    """Runs the kernels on a CPU, in Mosaic GPU's interpreter, for tests. Slow.

    The interpreter knows no multicast, so the tiles must have clusters of one CTA. A warpgroup that
    waits holds a thread of XLA's pool: with few cores set NPROC=16 before jax starts.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    global active
    before = active
    active = plgpu.InterpretGPUParams(detect_races=detect_races), tiles or small_tiles()
    try:
        yield
    finally:
        active = before


def small_tiles() -> Tiles:
    """The smallest tiles: several of each even in a tiny problem."""
    sparse = BackwardTiles(
        width=256,
        slots=8,
        slots_per_block=2,
        hidden_d=64,
        hidden_splits=2,
        head_d=64,
        steps=2,
        cluster=1,
    )
    exact = dataclasses.replace(sparse, slots_per_block=2, tile_c=256)
    return Tiles(
        forward=ForwardTiles(tile_n=64, tile_v=128, steps=2, cluster=1),
        sparse=sparse,
        exact=exact,
        fused=exact,
        tail=exact,
        tail_where_flat=exact,
        hot=128,
    )
