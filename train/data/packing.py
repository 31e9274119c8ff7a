"""Examples of many lengths into rows of one length, so that little of a batch is padding."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Int

from train.text.tokenizer import Example

IGNORE = -100

Batch = dict[str, Int[np.ndarray, "B _"]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """R rows of T tokens, int32.

    `rows[i:j]` and `rows[indices]` are batches: dicts of tokens, labels, segments, positions and
    starts.
    """

    tokens: Int[np.ndarray, "R T"]
    """0 in padding, which is told by its segment: 0 may be a token too."""
    labels: Int[np.ndarray, "R T"]
    """The token to predict after `tokens[t]`; −100 in prompts, in padding, at an example's end."""
    segments: Int[np.ndarray, "R T"]
    """1, 2, … for the examples of a row, from left to right; 0 for padding."""
    positions: Int[np.ndarray, "R T"]
    """0, 1, … from the start of each example; 0 for padding."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Int[np.ndarray, " B"]) -> Batch:
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array[index] for name, array in (arrays | {"starts": self.starts}).items()}

    @functools.cached_property
    def starts(self) -> Int[np.ndarray, "R M"]:
        """Where the examples of a row begin, from left to right; T where there are no more.

        M is the most examples of a row, rounded up to 1, 2, 4 or a multiple of 8: attention takes
        time for each, and another M is another program.
        """
        first = (self.segments > 0) & (self.positions == 0)
        most = int(first.sum(axis=1).max(initial=1))
        most = 1 << (most - 1).bit_length() if most <= 8 else math.ceil(most / 8) * 8
        length = self.tokens.shape[1]
        starts = np.full((len(self), max(most, length)), length, np.int32)
        starts[:, :length] = np.where(first, np.arange(length), length)
        starts = np.sort(starts, axis=1)[:, :most]
        starts[:, :1] = 0  # a row of padding alone is one segment, too
        return starts

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))

    @property
    def padding(self) -> float:
        """The share of the tokens that is padding; 0 without rows."""
        return float(np.mean(self.segments == 0)) if len(self) else 0.0


def pack(examples: Sequence[Example], length: int) -> Rows:
    """Lays every example whole into one of as few rows of `length` tokens as best fit gives.

    The longest examples come first, and each goes to the fullest row that has room for it. On
    instruction data of real lengths about one per cent of the result is padding, unless most
    examples are longer than half a row.

    Raises:
      ValueError: if an example is longer than `length`.
    """
    lengths = np.array([len(example.tokens) for example in examples], np.int64)
    if lengths.size and lengths.max() > length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit a row of {length}")
    order = np.argsort(-lengths, kind="stable")
    row, offset, rank = _best_fit(lengths[order], length)

    shape = (int(row.max()) + 1 if row.size else 0, length)
    rows = Rows(
        tokens=np.zeros(shape, np.int32),
        labels=np.full(shape, IGNORE, np.int32),
        segments=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    if not row.size:
        return rows

    lengths = lengths[order]
    tokens = np.concatenate([examples[i].tokens for i in order])
    is_label = np.concatenate([examples[i].loss_mask for i in order])
    ends = np.cumsum(lengths)
    position = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    labels = np.where(np.roll(is_label, -1), np.roll(tokens, -1), IGNORE)
    labels[ends - 1] = IGNORE  # what follows is another example

    cell = np.repeat(row * length + offset, lengths) + position
    rows.tokens.reshape(-1)[cell] = tokens
    rows.labels.reshape(-1)[cell] = labels
    rows.segments.reshape(-1)[cell] = np.repeat(rank + 1, lengths)
    rows.positions.reshape(-1)[cell] = position
    return rows


def _best_fit(
    lengths: Int[np.ndarray, " E"], capacity: int
) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Int[np.ndarray, " E"]]:
    """The row, the offset in it and the rank among its examples, for each length in turn."""
    row = np.zeros(len(lengths), np.int64)
    offset = np.zeros(len(lengths), np.int64)
    rank = np.zeros(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free room
    rooms = (
        0  # bit f is set where open_rows[f] is not empty; the lowest bit ≥ length is the best fit
    )
    count: list[int] = []
    for i, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row[i] = open_rows[free].pop()
            if not open_rows[free]:
                rooms &= ~(1 << free)
        else:
            free = capacity
            row[i] = len(count)
            count.append(0)
        offset[i] = capacity - free
        rank[i] = count[row[i]]
        count[row[i]] += 1
        open_rows[free - length].append(int(row[i]))
        rooms |= 1 << (free - length)
    return row, offset, rank
