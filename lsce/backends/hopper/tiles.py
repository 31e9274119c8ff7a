"""Tile sizes: what a kernel may be given.

A choice that cannot fit the registers or the shared memory of an SM cannot be built at all.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from lsce.problem import cdiv
from lsce.sparse.tokens import BLOCK

SHARED_MEMORY = 230_000
"""Bytes of an SM's shared memory that tiles may take; the rest is for barriers and reductions."""
L2 = 30_000_000
"""Bytes of hidden states that the L2 serves beside all else. An H100 has 50 MB in two halves, and
what SMs of both read may lie in each."""
CONSUMERS = 2
"""Warpgroups that multiply; each has half of a tile."""


def staged_columns(rows: int, columns: int) -> int:
    """How many columns of a consumer's tile are staged at a time on their way out: 16 KB."""
    return 128 if rows <= 64 and columns % 128 == 0 else 64


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel."""

    tile_n: int = 128
    """Tokens a CTA."""
    tile_v: int = 128
    """Vocabulary columns a consumer warpgroup."""
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
    def width(self) -> int:
        """Columns a CTA."""
        return CONSUMERS * self.tile_v

    @property
    def shared_memory(self) -> int:
        stage = (self.tile_n + self.width) * self.tile_d * 2
        return self.steps * stage + 8 * 4 * self.tile_n  # and at most 8 sums that are handed over


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the backward kernels."""

    width: int = 8192
    """Most columns of a chunk."""
    slots: int = 1024
    """Tiles of P in its buffer, at least."""
    slots_per_block: int = 28
    """The same for each block of tokens, where the vocabulary has many tiles."""
    tile_c: int = 128
    """Columns of a tile of P."""
    blocks: int = 1
    """Blocks of tokens in a tile of P."""
    hidden_d: int = 256
    """Hidden entries of a tile of dE."""
    hidden_splits: int = 1
    """Into how many sums dE is cut, for chips that its tiles alone would not fill."""
    head_c: int = 128
    """Columns of a tile of dC."""
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
        if self.blocks not in (1, 2) or self.blocks * self.tile_c > 256:
            raise ValueError(f"{self.blocks=} × {self.tile_c=} does not fit the registers")
        if self.width % self.tile_c:
            raise ValueError(f"{self.width=} must be a multiple of {self.tile_c=}")
        if self.hidden_d % 64 or not 0 < self.hidden_d <= 256:
            raise ValueError(f"{self.hidden_d=} must be a multiple of 64 up to 256")
        if self.head_c not in (128, 256) or self.tile_c % self.head_c:
            raise ValueError(f"{self.head_c=} must be 128 or 256 and divide {self.tile_c=}")
        if self.head_d % 64 or not 0 < self.head_d * self.head_c <= 256 * 128:
            raise ValueError(f"{self.head_d=} × {self.head_c=} does not fit the registers")
        if self.hidden_splits < 1:
            raise ValueError(f"{self.hidden_splits=} must be at least 1")
        if self.cluster not in (1, 2):
            raise ValueError(f"{self.cluster=} must be 1 or 2")
        if self.fitting(self.head_c + self.head_d, (self.head_c // 2, self.head_d)) < 2:
            raise ValueError(f"{self} leaves no room for two stages in shared memory")

    @property
    def group(self) -> int:
        """Blocks of tokens whose tiles of P are made together, from one tile of the head."""
        return self.cluster * self.blocks

    def padded_d(self, d: int) -> int:
        """Hidden entries in whole tiles of dE and of dC."""
        return max(cdiv(d, tile) * tile for tile in (self.hidden_d, self.head_d))

    def together(self, d: int) -> int:
        """Groups of tokens whose hidden states the L2 serves."""
        return max(L2 // (2 * self.group * BLOCK * d), 1)

    def slots_for(self, blocks: int, column_tiles: int) -> int:
        """Tiles of P in the buffer for so many token blocks and column tiles.

        An eighth of all of P at most, unless that is less than the two columns that `plan.work`
        needs: P is the largest temporary of a small problem.
        """
        per_block = min(self.slots_per_block, max(2, column_tiles // 8))
        return max(min(self.slots, blocks * column_tiles), blocks * per_block)

    def most_chunks(self, column_tiles: int, blocks: int, slots: int) -> int:
        """Into how many chunks `plan.work` cuts at most, with every pair active."""
        spare, most = slots - blocks, self.width // self.tile_c - 1
        return (column_tiles - 1) * max(blocks * most, spare) // (spare * most) + 1

    def static_chunks(
        self, column_tiles: int, blocks: int, slots: int, *, more: float = 1.0
    ) -> int:
        """How many steps the loop over chunks takes without looking whether there are any left.

        A look costs the host's waiting for the GPU, and then the GPU's waiting for the host: about
        0.3 ms. An empty step is a dozen kernels with nothing to do. So these are all chunks there
        can be where that is cheaper; else as many as real text needs, fitted at ε = 2^-10 to
        Gemma 3 270M's activations (8,192 tokens, V = 256,000: 12.5% of the columns, 4% of the
        pairs) and SmolLM2 135M's (V = 49,152: 37% and 11.5%), each also with 2,048 and 32,768.
        A smaller ε takes so many times `more`: a third at half of it, up to 3.2 at the default's.
        """
        # Fewer tiles or more blocks make more of them active.
        share = more * (2000 / column_tiles) ** 0.65 * (blocks / 64) ** 0.2
        by_columns = 0.125 * column_tiles / (self.width // self.tile_c - 1)
        by_pairs = 0.04 * column_tiles * blocks / (slots - blocks)
        usual = math.ceil(0.8 * share * (by_columns + by_pairs))
        most = self.most_chunks(column_tiles, blocks, slots)
        return most if (most - usual) * 16e-6 < 3e-4 else min(usual, most)

    def fitting(self, rows: int, staged: tuple[int, int] = (0, 64)) -> int:
        """How many of `steps` stages of `rows` rows fit beside tiles of `staged` outputs."""
        free = SHARED_MEMORY - 2 * CONSUMERS * staged[0] * staged_columns(*staged)
        return min(self.steps, free // (2 * rows * self.stage))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Everything that can be tuned for one problem."""

    forward: ForwardTiles = ForwardTiles()
    sparse: BackwardTiles = BackwardTiles()
    """With a filter."""
    exact: BackwardTiles = BackwardTiles(slots=0, slots_per_block=44, tile_c=256)
    fused: BackwardTiles = BackwardTiles(slots=0, tile_c=256)
    """With the gradients in the forward, all columns at once."""
    tail: BackwardTiles = BackwardTiles(slots=0, slots_per_block=40, tile_c=256)
    """Of what a filter leaves out, in 8 bits: `slots_per_block` tiles are a chunk."""
    tail_where_flat: BackwardTiles | None = None
    """The same beside a filter that drops it, where tokens are flat; None where a call is too small
    to look, or has few classes and no room for it in a filter's memory."""
    hot: int = 2048
    """Columns of the pass that bounds the log-sum-exp before the forward."""


FUSED_BYTES = 2_200_000_000
"""Bytes of P at a time where the gradients are made in the forward, for some of the tokens."""
FUSED_WHOLE_BYTES = 3_400_000_000
"""The same in P's own buffer for all tokens, which saves carrying dC from some to the next: a part
of P then lies where dC will be."""


class FusedLayout(NamedTuple):
    """Where P is kept between its making and its use in both products."""

    groups: int
    """Into how many groups of whole pairs of blocks the tokens are cut."""
    own: int
    """How many of the column tiles lie in P's own buffer. The others lie in that of dC, which is
    written in chunks of so many tiles, the last ones first."""


def fused_layout(n: int, d: int, v: int, tile_c: int) -> FusedLayout:
    """All tokens at once where that fits one of the limits above, else in the fewest groups."""
    pairs, column_tiles = max(cdiv(n, 2 * BLOCK), 1), cdiv(v, tile_c)
    rows = pairs * 2 * BLOCK
    if rows * v * 2 > FUSED_BYTES and d >= tile_c:
        own = beside_dc(rows, d, column_tiles, tile_c)
        if own * tile_c * rows * 2 <= FUSED_WHOLE_BYTES:
            return FusedLayout(1, own)
    in_each = cdiv(pairs, min(pairs, cdiv(rows * v * 2, FUSED_BYTES)))
    return FusedLayout(cdiv(pairs, in_each), column_tiles)  # none of them empty


def layout_within_dc(n: int, d: int, v: int, tile_c: int, units: int = 66) -> FusedLayout | None:
    """All tokens at once with an eighth of P in its own buffer, None where N > D.

    P of one chunk takes at most as many rows of dC as the chunk has, so that P of all chunks up to
    one lies in dC's rows of those before it, which are written after it. The eighth is more where
    chunks of so many tiles of dC leave fewer of the `units`, pairs of CTAs, idle at their ends.
    """
    if d < tile_c or cdiv(n, 2 * BLOCK) * 2 * BLOCK > d // tile_c * tile_c:
        return None
    column_tiles, across = cdiv(v, tile_c), cdiv(d, 256)
    eighth = cdiv(column_tiles, 8)

    def waves(own: int) -> int:
        chunks, last = divmod(column_tiles, own)
        return chunks * cdiv(own * across, units) + cdiv(last * across, units)

    return FusedLayout(
        1, min(range(eighth, eighth * 8 // 7 + 1), key=lambda own: (waves(own), own))
    )


def beside_dc(rows: int, d: int, column_tiles: int, tile_c: int) -> int:
    """How many column tiles of P need a buffer of their own, if those of dC take P of the others.

    dC [V, D] takes D // tile_c tiles of P side by side, so a smaller D leaves room for fewer. The
    others must fit into dC's rows of the own, as those are written last.
    """
    panels = d // tile_c
    if not panels:
        return column_tiles
    own = max(cdiv(column_tiles * rows, panels * tile_c + rows), cdiv(column_tiles, 2))
    while cdiv((column_tiles - own) * rows, BLOCK * panels) * BLOCK > own * tile_c:
        own += 1
    return own
