"""The rows of several files in one training: in what order, and how many are an epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of the rows that comes from one file."""

    rows: int
    """How many there are; they follow those of the shares before."""
    weight: Fraction = Fraction(1)


def epoch(shares: Sequence[Share]) -> Fraction:
    """How many rows, drawn by weight, hold every row at least once."""
    total = sum((share.weight for share in shares), Fraction(0))
    return max(share.rows * total / share.weight for share in shares)


def order(shares: Sequence[Share], seed: int) -> Any:
    """The indices of rows without end, as a `grain.MapDataset`.

    Each share comes by its weight, spread as evenly as can be, and all its rows come once, in an
    order of their own, before any comes again.
    """
    datasets, start = [], 0
    for number, share in enumerate(shares):
        own_seed = (seed + number * 0x9E3779B9) % 2**32
        rows = grain.MapDataset.range(start, start + share.rows)
        datasets.append(rows.seed(own_seed).shuffle().repeat())
        start += share.rows
    if len(datasets) == 1:
        return datasets[0]
    weights = [share.weight for share in shares]
    whole = math.lcm(*(weight.denominator for weight in weights))
    return grain.MapDataset.mix(datasets, weights=[int(weight * whole) for weight in weights])
