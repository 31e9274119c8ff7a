"""Tile sizes that were the fastest where they were measured."""

from __future__ import annotations

from lsce.backends.hopper.tiles import BackwardTiles, ForwardTiles

TUNED: dict[tuple[str, int, int, int, str], dict[str, ForwardTiles | BackwardTiles]] = {
    ("H100", 8192, 2304, 256000, "bfloat16"): {
        "sparse": BackwardTiles(
            width=8192,
            slots=2560,
            slots_per_block=40,
            tile_c=128,
            blocks=2,
            hidden_d=128,
            hidden_splits=1,
            head_c=128,
            head_d=192,
            stage=64,
            steps=6,
            cluster=2,
        ),
    },
    ("H100", 2048, 4096, 32000, "bfloat16"): {
        "sparse": BackwardTiles(
            width=8192,
            slots=640,
            slots_per_block=10,
            tile_c=128,
            blocks=1,
            hidden_d=256,
            hidden_splits=1,
            head_c=128,
            head_d=256,
            stage=64,
            steps=6,
            cluster=2,
        ),
    },
}
"""Measured winners by (family, N, D, V, dtype), as `python -m benchmarks.tune` prints them.

N is a power of two, and stands for all numbers of tokens to which it is the nearest. The fields of
`Tiles` that are not named keep the heuristic's: nothing is known that beats it."""
