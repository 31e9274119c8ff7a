"""What a model answered, question by question: a file that grows with each batch and is gone on
with after an interruption.

Its first line says whose answers they are, and each other line holds one question's. A last line
that was cut off while it was written is taken away.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers to N questions of up to K choices, by the questions' indices in their data."""

    index: Int[np.ndarray, " N"]
    label: Int[np.ndarray, " N"]
    """The right choice."""
    log_prob: Float[np.ndarray, "N K"]
    """Σ log p of the choice's tokens, nats; −inf where there is no such choice."""
    tokens: Int[np.ndarray, "N K"]
    """Tokens of each choice; 1 where there is none."""
    characters: Int[np.ndarray, "N K"]
    subjects: list[str]

    @classmethod
    def of(cls, lines: Mapping[int, Mapping[str, Any]]) -> Self:
        """From a file's lines, by index."""
        order = sorted(lines)
        most = max(len(lines[i]["log_prob"]) for i in order)

        def column(name: str, empty: float) -> np.ndarray:
            rows = [lines[i][name] for i in order]
            return np.array([row + [empty] * (most - len(row)) for row in rows])

        return cls(
            index=np.array(order),
            label=np.array([lines[i]["answer"] for i in order]),
            log_prob=column("log_prob", -np.inf),
            tokens=column("tokens", 1),
            characters=column("characters", 1),
            subjects=[lines[i]["subject"] for i in order],
        )


class AnswerFile:
    """The file of a task's answers.

    Args:
      path: where it is, or will be.
      whose: what the answers depend on; as JSON holds it.

    Raises:
      ValueError: if the file holds answers that depend on something else, or is none.
    """

    def __init__(self, path: Path, whose: Mapping[str, Any]) -> None:
        self.path = path
        self.lines: dict[int, dict[str, Any]] = {}
        if path.is_file() and b"\n" in path.read_bytes():
            self._read(whose)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            self._append([dict(whose)])

    def add(self, lines: Mapping[int, Mapping[str, Any]]) -> None:
        """Appends a batch, which a crash then leaves whole or cut off in one line."""
        new = {i: {"index": i, **line} for i, line in lines.items()}
        self._append(list(new.values()))
        self.lines |= new

    def _append(self, lines: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, whose: Mapping[str, Any]) -> None:
        head, lines, whole = read(self.path)
        changed = {name for name in whose.keys() | head.keys() if whose.get(name) != head.get(name)}
        if changed:
            what = ", ".join(
                f"{name} {head.get(name)}, now {whose.get(name)}" for name in sorted(changed)
            )
            raise ValueError(
                f"{self.path} holds answers that another evaluation gave ({what}): --overwrite, or"
                " another folder with --out"
            )
        os.truncate(self.path, whole)
        self.lines = lines


def read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """The first line of a file of answers, the others by index, and the bytes of whole lines.

    Raises:
      ValueError: for a file that is missing or none of answers.
    """
    if not path.is_file():
        raise ValueError(f"there is no file of answers {path}")
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        head, *rest = map(json.loads, content[:whole].splitlines())
        return dict(head), {line["index"]: line for line in rest}, whole
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of answers: {error}") from None
