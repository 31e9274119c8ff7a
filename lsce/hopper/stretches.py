"""How the forward cuts its work: pairs of a block of tokens and a stretch of the vocabulary.

U units (CTAs or clusters) share B blocks of T tiles of the vocabulary. ⌊B/U⌋ rounds of whole blocks
come first. R blocks are left; each of them is cut into S = ⌊U/R⌋ stretches, one a unit, and U − S·R
units would have nothing to do. They take the last tiles of all R blocks instead, as many as make
everybody's share the same, about R·T/U. Units in step read the same tiles of the head, which the L2
then serves: that is why the whole is not simply dealt out in U equal runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from lsce.hopper.engine import i32


class Stretches(NamedTuple):
    """A cut; scalars that may be known on the device only."""

    rounds: Any
    """Whole blocks a unit."""
    rest: Any
    """R: the blocks after these."""
    splits: Any
    """S: stretches of each of the rest."""
    extra: Any
    """Tiles at the end of each of the rest that the units left over take."""


def most_splits(blocks: int, tiles: int, units: int) -> int:
    """A bound of `splits`, whatever the number of blocks that turn out to have a loss.

    Partial results take memory for each stretch of every block, so there are no more than 16 where
    whole blocks come first, after which a few stretches are all the less of the whole.
    """
    rest = blocks % units
    full = units // rest if rest else 1
    return min(max(full if blocks < units else min(full, 16), 6), tiles)


def slots(most: int) -> int:
    """Partial results that a block may have with at most so many splits."""
    return most + 2


def cut(blocks, tiles: int, units: int, most: int) -> Stretches:
    """The cut of `blocks`, which may be traced, each into at most `most` stretches and a rest."""
    blocks = i32(blocks)
    rounds, rest = lax.div(blocks, i32(units)), lax.rem(blocks, i32(units))
    full = lax.div(i32(units), jnp.maximum(rest, 1))
    splits = jnp.minimum(full, most)
    spare = units - splits * rest
    extra = jnp.where((rest > 0) & (splits == full), lax.div(tiles * spare, i32(units)), 0)
    return Stretches(rounds, rest, splits, extra)


def _spare(c: Stretches, units) -> Any:
    """The units that take the extra tiles; at least 1, to divide by."""
    return jnp.maximum(units - c.splits * c.rest, 1)


def items(c: Stretches, tiles: int, unit, units) -> tuple[Any, Any]:
    """What a unit does: (how many items, i → (slot, block, first tile, tile after the last)).

    A block's items have slots 0, 1, … below `parts`.
    """
    spare, extra, rest = _spare(c, units), jnp.maximum(c.extra, 1), jnp.maximum(c.rest, 1)
    mine = unit - c.splits * c.rest
    begin = lax.div(mine * c.rest * c.extra, spare)
    end = lax.div((mine + 1) * c.rest * c.extra, spare)
    first_block = lax.div(begin, extra)
    several = jnp.where(end > begin, lax.div(end - 1, extra) - first_block + 1, 0)
    regular = mine < 0
    even = tiles - c.extra
    split = lax.div(unit, rest)

    def item(i):
        block = first_block + i - c.rounds
        first = jnp.maximum(begin - block * extra, 0)
        after = jnp.minimum(end - block * extra, extra)
        second = (first > 0).astype(jnp.int32)
        end_of_block = c.splits + second, block, even + first, even + after
        start, stop = lax.div(split * even, c.splits), lax.div((split + 1) * even, c.splits)
        stretch = split, lax.rem(unit, rest), start, stop
        # The rest begin after the whole blocks.
        whole = i32(0), unit + (i - c.rounds) * units, i32(0), i32(tiles)
        slot, block, first, after = (
            jnp.where(i < c.rounds, w, jnp.where(regular, s, e))
            for w, s, e in zip(whole, stretch, end_of_block, strict=True)
        )
        return slot, block + c.rounds * units, first, after

    return c.rounds + jnp.where(regular, 1, several), item


def parts(c: Stretches, block, units) -> Any:
    """Into how many items a block is cut."""
    spare, total = _spare(c, units), jnp.maximum(c.rest * c.extra, 1)
    at = (block - c.rounds * units) * c.extra
    owner = lambda tile: ((tile + 1) * spare - 1) // total
    ends = jnp.where(c.extra > 0, 1 + owner(at + c.extra - 1) - owner(at), 0)
    return jnp.where(block < c.rounds * units, 1, c.splits + ends)
