"""Tile sizes: what a kernel may be given, and what is best for a problem on a chip.

Pure functions of the problem, so that they can be tested without a GPU. A choice that cannot fit
the registers or the shared memory of an SM cannot be built at all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from lsce.problem import Problem

SHARED_MEMORY = 230_000
"""Bytes of an SM's shared memory that tiles may take; the rest is for barriers and reductions."""
L2 = 30_000_000
"""Bytes of hidden states that the L2 serves beside all else. An H100 has 50 MB in two halves, and
what SMs of both read may lie in each."""
BLOCK = 128
"""Tokens a block: the rows of one tile of the backward."""
CONSUMERS = 2
"""Warpgroups that multiply; each has half of a tile."""


def store_piece(rows: int, columns: int) -> int:
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

    def static_chunks(self, column_tiles: int, blocks: int, slots: int) -> int:
        """How many steps the loop over chunks takes without looking whether there are any left.

        A look costs the host's waiting for the GPU, and then the GPU's waiting for the host: about
        0.3 ms. An empty step is a dozen kernels with nothing to do. So these are all chunks there
        can be where that is cheaper; else as many as real text needs, fitted at ε = 2^-10 to
        Gemma 3 270M's activations (8,192 tokens, V = 256,000: 12.5% of the columns, 4% of the
        pairs) and SmolLM2 135M's (V = 49,152: 37% and 11.5%), each also with 2,048 and 32,768.
        """
        share = (2000 / column_tiles) ** 0.65 * (blocks / 64) ** 0.2
        by_columns = 0.125 * column_tiles / (self.width // self.tile_c - 1)
        by_pairs = 0.04 * column_tiles * blocks / (slots - blocks)
        usual = math.ceil(0.8 * share * (by_columns + by_pairs))
        most = self.most_chunks(column_tiles, blocks, slots)
        return most if (most - usual) * 16e-6 < 3e-4 else min(usual, most)

    def fitting(self, rows: int, staged: tuple[int, int] = (0, 64)) -> int:
        """How many of `steps` stages of `rows` rows fit beside tiles of `staged` outputs."""
        free = SHARED_MEMORY - 2 * CONSUMERS * staged[0] * store_piece(*staged)
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
    hot: int = 2048
    """Columns of the pass that bounds the log-sum-exp before the forward."""


FAMILIES = ("H100", "H200", "H800", "H20", "GH200")
"""The chips with compute capability 9.0, by the word that their device kind holds."""
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


def family(chip: str) -> str | None:
    """The word of a device kind that names its family: "NVIDIA H100 80GB HBM3" → "H100"."""
    return next((word for word in chip.split() if word in FAMILIES), None)


def choose(problem: Problem, ctas: int = 132) -> Tiles:
    """The heuristic's tiles, but those of the tuned entry if the chip and sizes have one."""
    p = problem
    key = family(p.chip) or "", nearest_power_of_two(p.n), p.d, p.v, p.hidden_dtype.name
    return dataclasses.replace(heuristic(p.n, p.d, p.v, ctas), **TUNED.get(key, {}))


def nearest_power_of_two(n: int) -> int:
    """By ratio: 12 is nearer to 16 than to 8."""
    return 2 ** round(math.log2(max(n, 1)))


def heuristic(n: int, d: int, v: int, ctas: int) -> Tiles:
    """Output tiles over the hidden size as wide as fit, with little of the last one empty.

    Where all pairs are computed their number is known, and so is which sizes fill the chip.
    """
    wide = even_tile(d, 256)
    tile_c = Tiles().exact.tile_c
    column_tiles = -(-v // tile_c)
    most = max(2, min(60, column_tiles // 8))
    group = -(-n // fused_layout(n, d, v, tile_c).groups)
    at_once = range(column_tiles, column_tiles + 1)
    # Gathered rows of the head: about 38 MB, but never more than a fifth of it.
    width = max(min(19_000_000 // d, v // 5, 32_768) // 512, 4) * 512
    # Few tokens make fewer tiles of dE than there are CTAs, unless each is cut into several sums.
    splits = min(max(ctas // (-(-n // BLOCK) * -(-d // wide) or 1), 1), 4)
    width, slots = within_a_quarter(n, d, v, width, BackwardTiles().slots_per_block)
    return Tiles(
        sparse=BackwardTiles(
            width=width,
            slots_per_block=slots,
            # Where columns have many blocks a tile of two needs less of the L2, P's bound.
            blocks=2 if n >= 128 * BLOCK else 1,
            hidden_d=wide,
            head_d=wide,
            hidden_splits=splits,
        ),
        exact=filling(Tiles().exact, n, d, column_tiles, range(2, most + 1), ctas),
        fused=filling(Tiles().fused, group, d, column_tiles, at_once, ctas, dividing=True),
    )


def within_a_quarter(n: int, d: int, v: int, width: int, slots: int) -> tuple[int, int]:
    """A chunk's columns and P's slots a block, fewer where that keeps a promise.

    The promise is a quarter of naive optax's memory, which is 4NV bytes and the gradients. Where
    the float32 sums of dE and the gradients leave something of it, P and the gathered rows must fit
    there, at the price of more chunks; where they leave nothing, nothing is to be won.
    """
    blocks, slot = -(-n // BLOCK), 2 * BLOCK * BLOCK
    left = n * v - 4 * n * d - 3 * (n + v) * d // 2 - 20_000_000
    if left <= 0 or 2 * width * d + slots * blocks * slot <= left:
        return width, slots
    width = max(width // 1024, 4) * 512
    return width, min(max((left - 2 * width * d) // (blocks * slot), 4), slots)


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
    """How many of the column tiles lie in P's own buffer, the others in that of dC."""


def fused_layout(n: int, d: int, v: int, tile_c: int) -> FusedLayout:
    """All tokens at once where that fits one of the limits above, else the fewest groups that do.

    dC [V, D] takes D // tile_c tiles of P side by side, so a smaller D leaves room for fewer.
    """
    pairs, column_tiles = max(-(-n // (2 * BLOCK)), 1), -(-v // tile_c)
    rows = pairs * 2 * BLOCK
    if rows * v * 2 > FUSED_BYTES and (panels := d // tile_c):
        # The others must fit into dC's rows of the own, as those are written last.
        own = max(-(-column_tiles * rows // (panels * tile_c + rows)), -(-column_tiles // 2))
        while -(-(column_tiles - own) * rows // BLOCK // panels) * BLOCK > own * tile_c:
            own += 1
        if own * tile_c * rows * 2 <= FUSED_WHOLE_BYTES:
            return FusedLayout(1, own)
    return FusedLayout(min(pairs, -(-rows * v * 2 // FUSED_BYTES)), column_tiles)


WIDTHS = {256: 1.0, 192: 1.04, 128: 1.15, 64: 1.5}
"""Output tiles over the hidden size, and the time that a multiplication takes in them."""


@functools.cache
def filling(
    base: BackwardTiles,
    n: int,
    d: int,
    column_tiles: int,
    most: range,
    ctas: int,
    *,
    dividing: bool = False,
) -> BackwardTiles:
    """`base` with the sizes that leave the fewest CTAs without a tile in the last wave.

    For all pairs of n tokens and `column_tiles` tiles, in chunks of some number of tiles in `most`.
    With `dividing` no tile of dC reaches beyond D (rounded up to 64): what it wrote there could be
    the P of others, where P lies in dC.
    """
    pairs, units = max(-(-n // (2 * BLOCK)), 1), max(ctas // base.cluster, 1)
    widths = [width for width in WIDTHS if -(-d // width) * width <= 1.2 * d] or [64]
    of_head = [width for width in widths if not dividing or -(-d // 64) * 64 % width == 0] or [64]

    # Times of a chunk's kernels in products of 256 × 256 × 64 by a pair of CTAs, 0.8 µs on an H100.
    def waves(tiles: int, inner: float, width: int, epilogue: float) -> float:
        return -(-tiles // units) * (inner / 64 * width / 256 * WIDTHS[width] + epilogue)

    def probabilities(tiles: int) -> float:
        return 20.0 + waves(tiles * pairs, float(d), 256, 5.0)

    def head(tiles: int, width: int) -> float:
        return waves(tiles * -(-d // width), 2.0 * BLOCK * pairs, width, 3.0)

    def hidden(tiles: int, width: int, splits: int) -> float:
        # A sum more is memory more, and two shorter sums are not quite as fast as one.
        inner = tiles * base.tile_c / splits * (1 + 0.05 * (splits - 1))
        return waves(pairs * -(-d // width) * splits, inner, width, 3.0)

    choices = []
    for tiles in most:
        chunks, last = divmod(column_tiles, tiles)

        def of_all(time, *sizes, tiles=tiles, chunks=chunks, last=last) -> float:
            return chunks * time(tiles, *sizes) + (time(last, *sizes) if last else 0)

        head_time, head_d = min((of_all(head, width), -width) for width in of_head)
        hidden_time, splits, hidden_d = min(
            (of_all(hidden, width, splits), splits, -width)
            for width, splits in itertools.product(widths, (1, 2, 4))
        )
        time = of_all(probabilities) + head_time + hidden_time
        choices.append((time, tiles, -hidden_d, splits, -head_d))
    _, tiles, hidden_d, splits, head_d = min(choices)
    return dataclasses.replace(
        base,
        slots_per_block=tiles,
        hidden_d=hidden_d,
        hidden_splits=splits,
        head_d=head_d,
    )


def even_tile(d: int, most: int) -> int:
    """The multiple of 64 up to `most` that covers d with the least excess; the widest of equals."""
    return min(range(64, most + 1, 64), key=lambda tile: (-(-d // tile) * tile, -tile))
