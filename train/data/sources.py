"""The files of --data, each with its weight in the mixture or none."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Self


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of --data."""

    path: Path
    weight: Fraction | None = None
    """Its share of the rows trained on, relative to the other files'; None where none has one."""

    @classmethod
    def of(cls, argument: str | Path) -> Self:
        """What `a.jsonl` or `a.jsonl:2` names; a file that has such a name is meant itself."""
        written = str(argument)
        path, colon, weight = written.rpartition(":")
        if not colon or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or Path(written).exists():
            return cls(Path(written))
        if not Fraction(weight):
            raise ValueError(f"--data {written}: a weight must be more than 0: leave the file out")
        return cls(Path(path), Fraction(weight))


def sources(data: Sequence[str | Path]) -> list[Source]:
    """The files of --data.

    Raises ValueError unless all of them have a weight or none has, and for one that is named twice.
    """
    found = [Source.of(argument) for argument in data]
    files = Counter(source.path.resolve() for source in found)
    for source in found:
        if files[source.path.resolve()] > 1:
            raise ValueError(
                f"--data names {source.path} twice: a weight (a.jsonl:2 b.jsonl:1) says how often a"
                " file is trained on"
            )
    unweighted = [source.path for source in found if source.weight is None]
    if unweighted and len(unweighted) < len(found):
        raise ValueError(
            f"--data: {unweighted[0]} has no weight and other files have: give all of them one"
            " (a.jsonl:2 b.jsonl:1), or none to see each record as often as any other"
        )
    return found
