"""The tasks: a page says how one reads its questions and how lm-evaluation-harness words them.

A new task is a page with `matches`, `parse` and `word`, and a line in `TASKS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from train.evaluation.items import Item
from train.evaluation.tasks import arc, hellaswag, mmlu, openbookqa, plain, sciq


class Page(Protocol):
    @staticmethod
    def matches(row: dict[str, Any]) -> bool:
        """Whether the fields of a row are those of this task."""
        ...

    @staticmethod
    def parse(row: dict[str, Any]) -> Item:
        """A row as a question; ValueError for what is wrong with it."""
        ...

    @staticmethod
    def word(item: Item) -> str:
        """The prompt that an answer follows after a blank, as lm-evaluation-harness words it."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """A task by name."""

    page: Page
    hub: str
    """The data set on the Hugging Face hub."""
    folder: str
    """In it, where the Parquet files of the splits are."""
    split: str = "test"
    """What is evaluated on."""
    examples: str = "train"
    """The split of the solved examples."""
    shots: int = 0
    prompt: str = "harness"
    marks: tuple[str, ...] = ()
    """Words that tell its files from others in the same folder."""


TASKS = {
    "mmlu": Task(mmlu, "cais/mmlu", "all", examples="dev", shots=5, prompt="hendrycks"),
    "hellaswag": Task(hellaswag, "Rowan/hellaswag", "data", split="validation"),
    "arc-easy": Task(arc, "allenai/ai2_arc", "ARC-Easy", marks=("easy",)),
    "arc-challenge": Task(arc, "allenai/ai2_arc", "ARC-Challenge", marks=("challenge",)),
    "sciq": Task(sciq, "allenai/sciq", "data"),
    "openbookqa": Task(openbookqa, "allenai/openbookqa", "main"),
}
PAGES: tuple[Page, ...] = (arc, openbookqa, sciq, hellaswag, plain)
"""What a file may hold, by its fields: the first that matches."""


def page_of(row: dict[str, Any]) -> Page:
    """The page of the task whose fields a row has; ValueError if it is none's."""
    for page in PAGES:
        if page.matches(row):
            return page
    raise ValueError(
        'a question has the fields "question", "choices" and "answer", or those that ARC,'
        f" OpenBookQA, SciQ or HellaSwag are published with, not {sorted(row)}"
    )
