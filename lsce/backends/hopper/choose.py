"""Which tile sizes are best for a problem on a chip.

Pure functions of the problem, so that they can be tested without a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from lsce.backends.hopper.tiles import (
    BLOCK,
    FUSED_BYTES,
    BackwardTiles,
    FusedLayout,
    Tiles,
    beside_dc,
    fused_layout,
    layout_within_dc,
)
from lsce.backends.hopper.tuned import TUNED
from lsce.problem import Problem, cdiv
from lsce.sparse import filter as filtering

FAMILIES = ("H100", "H200", "H800", "H20", "GH200")
"""The chips with compute capability 9.0, by the word that their device kind holds."""


def family(chip: str) -> str | None:
    """The word of a device kind that names its family: "NVIDIA H100 80GB HBM3" → "H100"."""
    return next((word for word in chip.split() if word in FAMILIES), None)


def tiles_for(problem: Problem, ctas: int = 132) -> Tiles:
    """The heuristic's tiles, but those of the tuned entry if the chip and sizes have one."""
    p = problem
    key = family(p.chip) or "", nearest_power_of_two(p.n), p.d, p.v, p.hidden_dtype.name
    layout = layout_of(p, Tiles().fused.tile_c, ctas)
    groups = 1 if layout is None else layout.groups
    return dataclasses.replace(heuristic(p.n, p.d, p.v, ctas, groups), **TUNED.get(key, {}))


def nearest_power_of_two(n: int) -> int:
    """By ratio: 12 is nearer to 16 than to 8."""
    return 2 ** round(math.log2(max(n, 1)))


def heuristic(n: int, d: int, v: int, ctas: int, groups: int | None = None) -> Tiles:
    """Output tiles over the hidden size as wide as fit, with little of the last one empty.

    Fused gradients are made of so many groups of tokens, by default as many as "fused" makes.

    Where all pairs are computed their number is known, and so is which sizes fill the chip.
    """
    wide = even_tile(d, 256)
    tile_c = Tiles().exact.tile_c
    column_tiles = cdiv(v, tile_c)
    most = max(2, min(60, column_tiles // 8))
    group = cdiv(n, groups or fused_layout(n, d, v, tile_c).groups)
    at_once = range(column_tiles, column_tiles + 1)
    # Gathered rows of the head: about 38 MB, but never more than a fifth of it.
    width = max(min(19_000_000 // d, v // 5, 32_768) // 512, 4) * 512
    # Few tokens make fewer tiles of dE than there are CTAs, unless each is cut into several sums.
    splits = min(max(ctas // (cdiv(n, BLOCK) * cdiv(d, wide) or 1), 1), 4)
    of_tail = max(2, min(column_tiles // 8, tail_within_a_quarter(n, d, v)))
    width, slots = within_a_quarter(n, d, v, width, BackwardTiles().slots_per_block)
    sparse = BackwardTiles(
        width=width,
        slots_per_block=slots,
        # Where columns have many blocks a tile of two needs less of the L2, P's bound.
        blocks=2 if n >= 128 * BLOCK else 1,
        hidden_d=wide,
        head_d=wide,
        hidden_splits=splits,
    )
    # Lists that one of two ways needs are there in the other, too: P is smaller by more.
    smaller = dataclasses.replace(sparse, slots_per_block=slots - 1)
    of_flat = tail_within_a_filter(n, d, v, smaller)
    if of_flat < ROOM_FOR_FLAT and v > filtering.FEW_FOR_8_BITS:
        of_flat = OWN_OF_FLAT
    of_flat = min(of_flat, of_tail)
    looks = of_flat >= min(of_tail, 4) and filtering.look_worthwhile(n, d, v)
    return Tiles(
        sparse=smaller if looks else sparse,
        exact=filling(Tiles().exact, n, d, column_tiles, range(2, most + 1), ctas),
        fused=filling(Tiles().fused, group, d, column_tiles, at_once, ctas, dividing=True),
        tail=filling(Tiles().tail, n, d, column_tiles, range(2, of_tail + 1), ctas),
        tail_where_flat=filling(Tiles().tail, n, d, column_tiles, range(of_flat, of_flat + 1), ctas)
        if looks
        else None,
    )


def layout_of(problem: Problem, tile_c: int, ctas: int) -> FusedLayout | None:
    """Where gradients made in the forward keep P; None where "fp8" makes them afterwards."""
    n, d, v = problem.n, cdiv(problem.d, 64) * 64, problem.v
    if problem.gradient_filter == "fp8":
        return exact_layout(n, d, v, tile_c, ctas // 2)
    return fused_layout(n, d, v, tile_c)


WHOLE_BYTES = 1_100_000_000
"""P of a call whose naive logits, of 32 bits, take no more than twice that: there a quarter of that
memory is worth less than the time that the tail's many small kernels take."""
ROOM_FOR_FLAT, OWN_OF_FLAT = 8, 18
"""Column tiles of a chunk of flat tokens' tail: where the memory of a filter has no room for 8, it
has its own for up to 18. Each chunk reads and writes the sums of dE, and has a dozen small kernels.
Few classes get none of their own: 8 bits are slower than naive optax there however wide the chunks,
though faster than blocks kept whole."""
LEAST_TOKENS = 2048
"""Of a group: each reads and writes dC, which for N tokens takes 650 / N of a product of theirs."""


def exact_layout(n: int, d: int, v: int, tile_c: int, units: int = 66) -> FusedLayout | None:
    """Where "fp8", whose gradients are exact mode's, makes them in the forward; None where the tail
    in 8 bits is the better way.

    Where N ≤ D nearly all of P lies in dC, and the memory is the tail's. Of few classes P takes
    what a quarter of naive optax's memory leaves (see `tail_within_a_quarter`), for some of the
    tokens at a time; where the tail has no quarter to keep either, 2D tokens. P of other small
    calls is whole, in dC and beside it. In groups of tokens only whole tiles of classes can be
    added to.
    """
    if within := layout_within_dc(n, d, v, tile_c, units):
        return within
    pairs, column_tiles = cdiv(n, 2 * BLOCK), cdiv(v, tile_c)
    small = 2 * n * v <= WHOLE_BYTES
    # Beside P and the gradients there is what rounding cuts off dC and the hidden states in order,
    # and of a group those again, scaled, and the sums of dE: four, and as many for a last group of
    # another size.
    at_once = (n * v - 7 * (n + v) * d // 2) // (2 * v + 36 * d)
    if at_once < LEAST_TOKENS:
        beyond = promised_of_the_tail(n, d, v) <= 0 and not (small and n <= 2 * d)
        at_once = 2 * d if beyond and 2 * d >= LEAST_TOKENS else 0
    if at_once and v <= filtering.FEW_FOR_8_BITS and v % tile_c == 0:
        groups = cdiv(pairs, min(at_once, FUSED_BYTES // (2 * v)) // (2 * BLOCK))
        return FusedLayout(cdiv(pairs, cdiv(pairs, groups)), column_tiles)
    if small:
        return FusedLayout(1, beside_dc(pairs * 2 * BLOCK, d, column_tiles, tile_c))
    return None


def within_a_quarter(n: int, d: int, v: int, width: int, slots: int) -> tuple[int, int]:
    """A chunk's columns and P's slots a block, fewer where that keeps a promise.

    The promise is a quarter of naive optax's memory, which is 4NV bytes and the gradients. Where
    the float32 sums of dE and the gradients leave something of it, P and the gathered rows must fit
    there, at the price of more chunks; where they leave nothing, nothing is to be won.
    """
    blocks, p_tile_bytes = cdiv(n, BLOCK), 2 * BLOCK * BLOCK
    left = n * v - 4 * n * d - 3 * (n + v) * d // 2 - 20_000_000
    if left <= 0 or 2 * width * d + slots * blocks * p_tile_bytes <= left:
        return width, slots
    width = max(width // 1024, 4) * 512
    return width, min(max((left - 2 * width * d) // (blocks * p_tile_bytes), 4), slots)


def tail_within_a_quarter(n: int, d: int, v: int) -> int:
    """Column tiles of a chunk of the tail, as many as keep the same promise, 4 at least.

    A column takes 2 bytes a token and as many a hidden entry: the terms and the head's row, each
    in 8 bits twice. Few tokens have more columns, since a chunk's kernels take their time whatever
    their size: as many as take what `slots_per_block` tiles take with 8,192 tokens. Where nothing
    is to be won as many as may, but no more than a quarter of the 4NV bytes for that.
    """
    tiles = Tiles().tail
    bytes_of_tile = 2 * tiles.tile_c * (n + d)
    most = tiles.slots_per_block * (8192 + d) // (n + d)
    most = max(tiles.slots_per_block, min(most, n * v // bytes_of_tile))
    left = promised_of_the_tail(n, d, v)
    return most if left <= 0 else min(max(left // bytes_of_tile, 4), most)


def promised_of_the_tail(n: int, d: int, v: int) -> int:
    """Bytes that a quarter of naive optax's leaves for the tail's chunks."""
    return n * v - 6 * n * d - 3 * (n + v) * d // 2 - 20_000_000


def tail_within_a_filter(n: int, d: int, v: int, sparse: BackwardTiles) -> int:
    """Column tiles of a chunk of the tail in the memory of a filter's P and gathered rows, whose
    branch of the program it is not: beside them lie the hidden states, in 8 bits twice."""
    slots = sparse.slots_for(cdiv(n, BLOCK), cdiv(v, sparse.tile_c))
    left = slots * BLOCK * sparse.tile_c + (sparse.width - n) * d
    return left // (Tiles().tail.tile_c * (n + d))


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
    pairs, units = max(cdiv(n, 2 * BLOCK), 1), max(ctas // base.cluster, 1)
    widths = [width for width in WIDTHS if cdiv(d, width) * width <= 1.2 * d] or [64]
    of_head = [width for width in widths if not dividing or cdiv(d, 64) * 64 % width == 0] or [64]

    # Times of a chunk's kernels in products of 256 × 256 × 64 by a pair of CTAs, 0.8 µs on an H100.
    def waves(tiles: int, inner: float, width: int, epilogue: float) -> float:
        return cdiv(tiles, units) * (inner / 64 * width / 256 * WIDTHS[width] + epilogue)

    def probabilities(tiles: int) -> float:
        return 20.0 + waves(tiles * pairs, float(d), 256, 5.0)

    def head(tiles: int, width: int) -> float:
        return waves(tiles * cdiv(d, width), 2.0 * BLOCK * pairs, width, 3.0)

    def hidden(tiles: int, width: int, splits: int) -> float:
        # A sum more is memory more, and two shorter sums are not quite as fast as one.
        inner = tiles * base.tile_c / splits * (1 + 0.05 * (splits - 1))
        return waves(pairs * cdiv(d, width) * splits, inner, width, 3.0)

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
    return min(range(64, most + 1, 64), key=lambda tile: (cdiv(d, tile) * tile, -tile))
