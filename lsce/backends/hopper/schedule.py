"""How the forward cuts its work: pairs of a block of tokens and a stretch of the vocabulary.

U units (CTAs or clusters) share B blocks of T tiles of the vocabulary, G blocks at a time: ⌊B/G⌋
rounds come first, in which each block has U/G units and each of these one stretch of T·G/U tiles.
R blocks are left (or G + R, after a round less, where R would be too few for all units). Each of
them is cut into S = ⌊U/R⌋ stretches, one a unit, and U − S·R units would have nothing to do. They
take the last tiles of all R blocks instead, as many as make everybody's share the same, about
R·T/U.

Units in step read the same tiles of the head, which the L2 then serves: that is why the whole is
not simply dealt out in U equal runs. And a unit reads its block's hidden states once a tile, so G
is such that the L2 serves those of G blocks too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from lsce.backends.hopper import tiles
from lsce.backends.hopper.kernels.pipeline import i32

MOST_ROUND_SPLITS = 6
"""Most stretches of a block in a round: partial results take memory for each."""
SHORTEST = 32
"""Fewest tiles of such a stretch, as there is something to be done before and after each."""


class Cut(NamedTuple):
    """How so many blocks are cut; scalars that may be known on the device only."""

    rounds: Any
    """Rounds of G blocks each."""
    rest: Any
    """R: the blocks after these."""
    splits: Any
    """S: stretches of each of the rest."""
    extra: Any
    """Tiles at the end of each of the rest that the units left over take."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is known when the kernel is made."""

    blocks: int
    """Most blocks that may have a loss."""
    tiles: int
    """T."""
    units: int
    """U."""
    together: int
    """G, which divides U."""

    @classmethod
    def served_by_l2(cls, blocks: int, block_bytes: int, v_tiles: int, units: int) -> Schedule:
        """With as many blocks at a time as the L2 serves, if their hidden states take so much."""
        splits = [s for s in range(1, MOST_ROUND_SPLITS + 1) if units % s == 0]
        allowed = [units // s for s in splits if s == 1 or v_tiles // s >= SHORTEST]
        served = [g for g in allowed if g * block_bytes <= tiles.L2]
        return cls(blocks, v_tiles, units, max(served) if served else min(allowed))

    @property
    def round_splits(self) -> int:
        """Stretches of a block in a round."""
        return self.units // self.together

    @property
    def most_splits(self) -> int:
        """A bound of `splits`, whatever the number of blocks that turn out to have a loss.

        Where rounds come first no more than 16, after which a few stretches are all the less of the
        whole.
        """
        rest = self.blocks % self.together
        full = self.units // rest if rest else 1
        most = full if self.blocks < self.together else min(full, 16)
        return min(max(most, MOST_ROUND_SPLITS), self.tiles)

    @property
    def partials(self) -> int:
        """Partial results that a block may have."""
        return max(self.most_splits + 2, self.round_splits)

    def cut(self, blocks: Any) -> Cut:
        """The cut of so many blocks, which may be traced."""
        blocks = i32(blocks)
        rounds, rest = lax.div(blocks, i32(self.together)), lax.rem(blocks, i32(self.together))
        if self.round_splits > 1:
            few = (rest > 0) & (rest * (self.most_splits + 1) <= self.units) & (rounds > 0)
            rounds = jnp.where(few, rounds - 1, rounds)
            rest = jnp.where(few, rest + self.together, rest)
        full = lax.div(i32(self.units), jnp.maximum(rest, 1))
        splits = jnp.minimum(full, self.most_splits)
        spare = self.units - splits * rest
        extra = lax.div(self.tiles * spare, i32(self.units))
        extra = jnp.where((rest > 0) & (splits == full), extra, 0)
        return Cut(rounds, rest, splits, extra)

    def items(self, c: Cut, unit: Any) -> tuple[Any, Any]:
        """What a unit does: (how many items, i → (partial, block, first tile, tile after it)).

        A block's items have partials 0, 1, … below `parts`.
        """
        spare, extra, rest = self._spare(c), jnp.maximum(c.extra, 1), jnp.maximum(c.rest, 1)
        mine = unit - c.splits * c.rest
        begin = lax.div(mine * c.rest * c.extra, spare)
        end = lax.div((mine + 1) * c.rest * c.extra, spare)
        first_block = lax.div(begin, extra)
        several = jnp.where(end > begin, lax.div(end - 1, extra) - first_block + 1, 0)
        regular = mine < 0
        even = self.tiles - c.extra
        split = lax.div(unit, rest)
        in_rounds = c.rounds * self.together

        def stretch(i, count, tiles):
            return lax.div(i * tiles, count), lax.div((i + 1) * tiles, count)

        def item(i):
            nth, rank = lax.div(unit, i32(self.together)), lax.rem(unit, i32(self.together))
            of_round = (
                nth,
                i * self.together + rank,
                *stretch(nth, i32(self.round_splits), i32(self.tiles)),
            )
            of_rest = split, in_rounds + lax.rem(unit, rest), *stretch(split, c.splits, even)
            block = first_block + i - c.rounds
            first = jnp.maximum(begin - block * extra, 0)
            after = jnp.minimum(end - block * extra, extra)
            second = (first > 0).astype(jnp.int32)
            of_ends = c.splits + second, in_rounds + block, even + first, even + after
            return tuple(
                jnp.where(i < c.rounds, x, jnp.where(regular, y, z))
                for x, y, z in zip(of_round, of_rest, of_ends, strict=True)
            )

        return c.rounds + jnp.where(regular, 1, several), item

    def parts(self, c: Cut, block: Any) -> Any:
        """Into how many items a block is cut."""
        spare, total = self._spare(c), jnp.maximum(c.rest * c.extra, 1)
        in_rounds = c.rounds * self.together
        at = (block - in_rounds) * c.extra
        owner = lambda tile: ((tile + 1) * spare - 1) // total
        ends = jnp.where(c.extra > 0, 1 + owner(at + c.extra - 1) - owner(at), 0)
        return jnp.where(block < in_rounds, self.round_splits, c.splits + ends)

    def _spare(self, c: Cut) -> Any:
        """The units that take the extra tiles; at least 1, to divide by."""
        return jnp.maximum(self.units - c.splits * c.rest, 1)
