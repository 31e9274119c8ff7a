"""Tile sizes: what a kernel may be given, and what is best for a problem on a chip.

Pure functions of the problem, so that they can be tested without a GPU. A choice that cannot fit
the registers or the shared memory of an SM cannot be built at all.
"""

from __future__ import annotations

import dataclasses

from lsce.problem import Problem

SHARED_MEMORY = 230_000
"""Bytes of an SM's shared memory that tiles may take; the rest is for barriers and reductions."""
BLOCK = 128
"""Tokens a block: the rows of one tile of the backward."""
STORE_COLUMNS = 64
"""Columns of one store: a 128-byte row of bfloat16, the widest swizzle."""
CONSUMERS = 2
"""Warpgroups that multiply; each has half of a tile."""


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel."""

    tile_n: int = 64
    """Tokens a consumer warpgroup."""
    tile_v: int = 256
    """Vocabulary columns a tile."""
    tile_d: int = 64
    """Hidden entries a stage."""
    steps: int = 4
    """Stages in flight."""
    cluster: int = 2
    """CTAs that share the head's tiles by multicast."""

    def __post_init__(self) -> None:
        if self.tile_n not in (64, 128):
            raise ValueError(f"{self.tile_n=} must be 64 or 128")
        if self.tile_v % 128 or not 0 < self.tile_v <= 256:
            raise ValueError(f"{self.tile_v=} must be 128 or 256")
        if self.tile_n * self.tile_v > 64 * 256:
            raise ValueError(f"{self.tile_n=} × {self.tile_v=} does not fit the registers")
        if self.tile_d not in (32, 64):
            raise ValueError(f"{self.tile_d=} must be 32 or 64")
        if self.cluster not in (1, 2):
            raise ValueError(f"{self.cluster=} must be 1 or 2")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self.shared_memory=} bytes exceed {SHARED_MEMORY=}")

    @property
    def block(self) -> int:
        """Tokens a CTA."""
        return 2 * self.tile_n

    @property
    def shared_memory(self) -> int:
        return self.steps * (self.block + self.tile_v) * self.tile_d * 2


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the backward kernels."""

    width: int = 8192
    """Most columns of a chunk."""
    slots: int = 1280
    """Tiles of P in its buffer, at least."""
    slots_per_block: int = 20
    """The same for each block of tokens, where the vocabulary has many tiles."""
    tile_c: int = 128
    """Columns a tile."""
    hidden_d: int = 256
    """Hidden entries of a tile of dE."""
    head_d: int = 256
    """Hidden entries of a tile of dC."""
    stage: int = 64
    """Inner dimension of one stage."""
    steps: int = 4
    """Stages in flight."""
    cluster: int = 2
    """CTAs that share an operand's tiles by multicast, where the work allows it."""

    def __post_init__(self) -> None:
        if self.tile_c not in (128, 256):
            raise ValueError(f"{self.tile_c=} must be 128 or 256")
        if self.width % self.tile_c:
            raise ValueError(f"{self.width=} must be a multiple of {self.tile_c=}")
        if self.hidden_d % 64 or not 0 < self.hidden_d <= 256:
            raise ValueError(f"{self.hidden_d=} must be a multiple of 64 up to 256")
        if self.head_d % 64 or not 0 < self.head_d * self.tile_c <= 256 * 128:
            raise ValueError(f"{self.head_d=} × {self.tile_c=} does not fit the registers")
        if self.cluster not in (1, 2):
            raise ValueError(f"{self.cluster=} must be 1 or 2")
        if self.fitting(self.tile_c + self.head_d, self.tile_c // 2) < 2:
            raise ValueError(f"{self} leaves no room for two stages in shared memory")

    def slots_for(self, blocks: int, column_tiles: int) -> int:
        """Tiles of P in the buffer for so many token blocks and column tiles.

        An eighth of all of P at most, unless that is less than the two columns that `plan.work`
        needs: P is the largest temporary of a small problem.
        """
        per_block = min(self.slots_per_block, max(2, column_tiles // 8))
        return max(min(self.slots, blocks * column_tiles), blocks * per_block)

    def fitting(self, rows: int, staged: int) -> int:
        """How many of `steps` stages of `rows` rows fit beside `staged` rows of output."""
        free = SHARED_MEMORY - 2 * CONSUMERS * 2 * staged * STORE_COLUMNS
        return min(self.steps, free // (2 * rows * self.stage))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Everything that can be tuned for one problem."""

    forward: ForwardTiles = ForwardTiles()
    sparse: BackwardTiles = BackwardTiles()
    """With a filter."""
    exact: BackwardTiles = BackwardTiles(slots=0, slots_per_block=32, tile_c=256, head_d=128)
    hot: int = 2048
    """Columns of the pass that bounds the log-sum-exp before the forward."""


FAMILIES = ("H100", "H200", "H800", "H20", "GH200")
"""The chips with compute capability 9.0, by the word that their device kind holds."""
TUNED: dict[tuple[str, int, int], Tiles] = {}
"""Measured winners by (family, D, V), as `python -m benchmarks.tune` prints them."""


def family(chip: str) -> str | None:
    """The word of a device kind that names its family: "NVIDIA H100 80GB HBM3" → "H100"."""
    return next((word for word in chip.split() if word in FAMILIES), None)


def choose(problem: Problem) -> Tiles:
    """The tuned entry for the chip and the head if there is one, else the heuristic."""
    key = family(problem.chip) or "", problem.d, problem.v
    return TUNED.get(key) or heuristic(problem.d)


def heuristic(d: int) -> Tiles:
    """Output tiles over the hidden size as wide as fit, with little of the last one empty."""
    return Tiles(
        sparse=BackwardTiles(hidden_d=even_tile(d, 256), head_d=even_tile(d, 256)),
        exact=dataclasses.replace(
            Tiles().exact, hidden_d=even_tile(d, 256), head_d=even_tile(d, 128)
        ),
    )


def even_tile(d: int, most: int) -> int:
    """The multiple of 64 up to `most` that covers d with the least excess; the widest of equals."""
    return min(range(64, most + 1, 64), key=lambda tile: (-(-d // tile) * tile, -tile))
