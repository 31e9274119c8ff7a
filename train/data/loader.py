"""Batches of packed rows, in an order that can be resumed exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np

from train.data import mixture
from train.data.mixture import Share
from train.data.packing import Batch, Rows


class PackedLoader:
    """Batches of packed rows without end, in an order that `seed` decides.

    Each epoch is all the rows once in a new order. A batch that reaches the end of an epoch takes
    its other rows from the next, so none is left out and every batch has `batch_size` rows. With
    `shares`, rows come by weight (`mixture.order`), and an epoch is as many as hold all of them.

    `state()` says where the loader is, in a dict of numbers and strings fit for JSON. A loader of
    the same rows, batch size, seed and shares, in this process or another, that is given it by
    `set_state` goes on with exactly the batches that this one would have given next.
    """

    def __init__(
        self, rows: Rows, batch_size: int, seed: int = 0, shares: Sequence[Share] | None = None
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}")
        if not len(rows):
            raise ValueError("there are no rows to load")
        self.rows = rows
        self.batch_size = batch_size
        self.shares = shares or [Share(len(rows))]
        self._identity = _identity(rows, batch_size, seed, self.shares)
        # Nothing remains of an endless sequence; but to keep what does, grain would overflow.
        indices = mixture.order(self.shares, seed).batch(batch_size, drop_remainder=True)
        # The rows are in memory: threads that read ahead would only add to what can go wrong.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(indices.map(lambda i: rows[i]).to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def steps(self, epochs: float) -> int:
        """The fewest batches that hold all rows at least `epochs` times."""
        rows = Fraction(str(epochs)) * mixture.epoch(self.shares)  # as written: 1.1 · 10 are 11
        return math.ceil(rows / self.batch_size)

    def epochs(self, steps: int) -> float:
        """How many times over `steps` batches hold all the rows."""
        return float(steps * self.batch_size / mixture.epoch(self.shares))

    def state(self) -> dict[str, Any]:
        return {"identity": self._identity, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          ValueError: if it was taken from a loader of other rows, batch size, seed or shares, or is
            no position at all.
        """
        if not {"identity", "iterator"} <= state.keys():
            raise ValueError(f"the saved position is damaged: it holds {state}")
        if state["identity"] != self._identity:
            raise ValueError(
                "the saved position belongs to other data: to resume, the data files and their"
                " weights, the Python version (for the default data), max_length, batch size and"
                " seed must be the same"
            )
        self._iterator.set_state(state["iterator"])


def _identity(rows: Rows, batch_size: int, seed: int, shares: Sequence[Share]) -> str:
    drawn = f"{rows.tokens.shape} {batch_size} {seed}"
    if len(shares) > 1:
        drawn += "".join(f" {share.rows}:{share.weight}" for share in shares)
    return digest(rows, drawn)


def digest(rows: Rows, beginning: str = "") -> str:
    """Tells rows from others, in every process."""
    found = hashlib.blake2b(beginning.encode(), digest_size=16)
    for array in (rows.tokens, rows.labels, rows.segments):
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()
