"""Where the questions of a task come from: a file, a folder, or the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from train.data import hub
from train.evaluation.items import SUFFIXES, Item, values
from train.evaluation.tasks import TASKS, Page, Task, page_of, plain
from train.flags import require

SPLITS = {
    "test": ("test",),
    "validation": ("validation", "val", "valid"),
    "dev": ("dev",),
    "train": ("train", "training"),
}
"""The words that mean a split in the names of files and folders."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a task, and solved examples of it."""

    name: str
    """The task's, or the file."""
    source: str
    """Where they were read."""
    items: Sequence[Item]
    page: Page
    examples: Mapping[str, Sequence[Item]] = dataclasses.field(default_factory=dict)
    """By subject, in the order of the data; "" for what has none."""

    def sample(self, limit: int | None, seed: int) -> list[int]:
        """The indices of at most `limit` of them, drawn by the seed; a larger limit draws the same
        ones and more."""
        count = len(self.items)
        order = np.random.default_rng(seed).permutation(count)
        return sorted(order[: count if limit is None else limit].tolist())


def load(
    name: str,
    data: Path | None = None,
    *,
    split: str | None = None,
    shots: int | None = None,
    shots_from: Path | None = None,
) -> Questions:
    """The questions of a named task or of a file, with the solved examples for so many shots.

    Args:
      name: of `TASKS`, or a file: JSON lines, a JSON array, CSV or Parquet.
      data: a named task's file, or a folder with its files, whose names tell their split; the
        folder may hold one of the task's name. None: the Hugging Face hub, or what was read there
        before.
      split: another one than the task's own.
      shots: solved examples; None for the task's own number.
      shots_from: a file to take them from.

    Raises:
      ValueError: for what is not there or cannot be had; naming file and line of a bad question.
    """
    task = TASKS.get(name)
    if task is None:
        known = ", ".join(TASKS)
        require(Path(name).is_file(), f"--task must be one of {known}, or a file, not {name}")
        items, page = read([Path(name)])
        require(
            not shots or shots_from is not None,
            f"--shots {shots} needs solved examples: --shots-from FILE",
        )
        _require_use(shots_from, shots)
        examples = read([shots_from])[0] if shots and shots_from else []
        return Questions(name, name, items, page, by_subject(examples, False))
    paths = find(name, task, split or task.split, data)
    items, page = read(paths, task.page)
    count = task.shots if shots is None else shots
    _require_use(shots_from, count)
    examples = []
    if count:
        where = [shots_from] if shots_from else find(name, task, task.examples, data)
        examples, _ = read(where, task.page)
    source = str(data) if data else f"{task.hub} {task.folder}"
    of_subjects = any(item.subject for item in items)
    return Questions(
        name, f"{source} ({split or task.split})", items, page, by_subject(examples, of_subjects)
    )


def _require_use(shots_from: Path | None, shots: int | None) -> None:
    require(
        bool(shots) or shots_from is None,
        f"--shots-from {shots_from} gives solved examples, of which none is asked for: --shots K",
    )


def read(paths: Sequence[Path], page: Page | None = None) -> tuple[list[Item], Page]:
    """The questions of files, and the page that words them: `page`, or that of the first one.

    Rows that only look like a user's own are the named task's.
    """
    items = []
    for path in paths:
        for where, row in values(path):
            try:
                found = page if page and page.matches(row) else page_of(row)
                page = page or found
                require(
                    found in (page, plain),
                    "a question of another task than those before or than --task names",
                )
                item = found.parse(row)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where}: {error}") from None
            items.append(item if item.name else dataclasses.replace(item, name=_place(where, item)))
    return items, page or plain


def by_subject(examples: Sequence[Item], of_subjects: bool) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = defaultdict(list)
    for item in examples:
        found[item.subject if of_subjects else ""].append(item)
    return dict(found)


def find(
    name: str, task: Task, split: str, data: Path | None, flag: str = "--task-data"
) -> list[Path]:
    """The files of a split, in what `flag` named.

    Raises:
      ValueError: if there are none, or no network.
    """
    require(split in SPLITS, f"the split of {name} must be one of {', '.join(SPLITS)}, not {split}")
    if data is None:
        instead = (
            f"Without a network {flag} names a copy of them, or the JSON lines or CSV they were"
            " published as"
        )
        pattern = f"{task.folder}/{split}*.parquet"
        return hub.files(f"the questions of {name}", task.hub, pattern, instead)
    require(data.exists(), f"there is no {data}: {flag} names a file or a folder")
    if data.is_file():
        return [data]
    own = [data / folder for folder in _folders(name) if (data / folder).is_dir()]
    folder = own[0] if own else data
    of_others = {part for other in TASKS for part in _folders(other)} if not own else set()
    there = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and p.is_file()
        and p.relative_to(folder).parts[0] not in of_others
    )
    names = {p: set(re.split(r"[^a-z]+", str(p.relative_to(folder)).lower())) for p in there}
    found = [
        p
        for p in there
        if names[p] & {*SPLITS[split]} and all(mark in names[p] for mark in task.marks)
    ]
    if not found and len(there) == 1 and split == task.split:
        found = there
    require(
        bool(found),
        f"{folder} holds no file of {name} whose name says {' or '.join(SPLITS[split])}:"
        f" {', '.join(p.name for p in there[:5]) or 'nothing'}",
    )
    return found


def _folders(name: str) -> tuple[str, str]:
    """What a task's own folder may be called, beside those of others."""
    return name, name.split("-")[0]


def _place(where: str, item: Item) -> str:
    """File and line without folders."""
    return Path(where.replace(" row ", ":")).name
