"""What experiments read: published records and questions, from a folder or from the hub."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.paper.plan import in_turn
from train import files as whole
from train.data import files, hub
from train.evaluation import questions
from train.evaluation.tasks import TASKS

Rows = Iterable[Mapping[str, Any]]
ALPACA_SAMPLE = 9229
"""Records of the paper's size of Alpaca."""


@dataclasses.dataclass(frozen=True)
class Instructions:
    """A published set of instructions."""

    hub: str
    """The data set on the Hugging Face hub, and its files there."""
    pattern: str
    chosen: Callable[[list[Mapping[str, Any]]], Rows]
    """Those to train on."""


def _alpaca(rows: list[Mapping[str, Any]]) -> Rows:
    """Its random 9k where a copy says which these are, else as many drawn by a seed."""
    marked = [row for row in rows if "random_9k" in row.get("subsets", ())]
    sample = marked or random.Random(0).sample(rows, min(ALPACA_SAMPLE, len(rows)))
    return ({name: row[name] for name in ("instruction", "input", "output")} for row in sample)


def _dolly(rows: list[Mapping[str, Any]]) -> Rows:
    """All of it; the published form says context and response."""
    return (
        {
            "instruction": row["instruction"],
            "input": row.get("input", row.get("context", "")),
            "output": row.get("output", row.get("response", "")),
        }
        for row in rows
    )


INSTRUCTIONS = {
    "alpaca": Instructions("tatsu-lab/alpaca", "data/train-*.parquet", _alpaca),
    "dolly": Instructions("databricks/databricks-dolly-15k", "*.jsonl", _dolly),
}


ASKED = ("mmlu", "hellaswag", "arc-easy")
FITTED = ("mmlu", "arc-easy")
"""Tasks with a validation split besides what is asked, to fit a temperature on."""


def check_questions(tasks: Iterable[str], folder: pathlib.Path | None) -> None:
    """Raises ValueError unless the questions of all tasks are there, or come from the hub now."""
    for name in tasks:
        task = TASKS[name]
        needed = [task.split, *([task.examples] * bool(task.shots))]
        needed += ["validation"] * (name in FITTED)
        for split in needed:
            questions.find(name, task, split, questions_of(name, folder), "--data-folder")


def questions_of(name: str, folder: pathlib.Path | None) -> pathlib.Path | None:
    """The folder of a task's files, `arc` for arc-easy; None for the hub."""
    own = [folder / part for part in (name, name.split("-")[0])] if folder else []
    return next((path for path in own if path.is_dir()), None)


def write_instructions(name: str, folder: pathlib.Path | None, path: pathlib.Path) -> None:
    """Puts the records to train on at `path`, without those of an empty response.

    Raises:
      ValueError: naming what is not there or cannot be read.
    """
    found = INSTRUCTIONS[name]
    rows = []
    for file in _files(name, found, folder):
        for where, row in files.values(file):
            if isinstance(row, ValueError):
                raise ValueError(f"{where}: {row}")
            rows.append(row)
    try:
        kept = [row for row in found.chosen(rows) if row["output"].strip()]
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the files of {name} hold other records than published: {error!r}"
        ) from None
    write_lines(path, kept)


def _files(name: str, found: Instructions, folder: pathlib.Path | None) -> list[pathlib.Path]:
    if folder is not None and (folder / name).is_dir():
        there = sorted(p for p in (folder / name).rglob("*") if p.suffix in (".jsonl", ".parquet"))
        if not there:
            raise ValueError(f"there is no *.jsonl and no *.parquet in {folder / name}")
        return there
    instead = (
        f"Without a network --data-folder names a folder with a folder {name} that holds them as"
        " *.jsonl or *.parquet"
    )
    return hub.files(f"the records of {name}", found.hub, found.pattern, instead)


def write_lines(path: pathlib.Path, rows: Rows) -> None:
    """Records as JSON lines, whole or not at all, whoever else writes them at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(path.parent):
        whole.write(path, "".join(json.dumps(row) + "\n" for row in rows))
