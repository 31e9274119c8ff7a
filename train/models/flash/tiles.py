"""What attention's kernels share: tiles, what is seen of them, and how a score is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from jaxtyping import Array, Int

TILE = 64
"""Queries, and keys, of a tile. One warpgroup multiplies two; several of them, each a thread block
of its own, share a multiprocessor and hide each other's waiting: most segments are too short for a
long pipeline."""
STEPS = 2
"""Tiles on their way or in use at a time."""
LOG2E = math.log2(math.e)


class Bounds(NamedTuple):
    """Who sees whom: query t the keys first[t] … t. Neither may fall from a token to the next."""

    first: Int[Array, "B T"]
    """The first key that a query sees."""
    end: Int[Array, "B T"]
    """Behind the last query that sees a key."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores are made, and by whom."""

    scale: float
    softcap: float | None
    interpret: Any = None

    def in_bits(self, products: Any) -> tuple[Any, Any]:
        """The scores of q·k in units of log 2, and their derivative by scale · q·k · log₂e.

        None stands for 1.
        """
        if self.softcap is None:
            return products * (self.scale * LOG2E), None
        from lsce.backends.hopper.kernels.lse_forward import capped

        tanh = capped(products, self.softcap / self.scale)
        return tanh * (self.softcap * LOG2E), 1.0 - tanh * tanh
