"""MMLU: 57 subjects from school to profession, answered by a letter (Hendrycks et al., 2021).

https://arxiv.org/abs/2009.03300
"""

from __future__ import annotations

from typing import Any

from train.evaluation.items import LETTERS, Item, letter
from train.evaluation.tasks import plain


def matches(row: dict[str, Any]) -> bool:
    return plain.matches(row)


def parse(row: dict[str, Any]) -> Item:
    """A row of a CSV file of the first release (see `items.values`), or of the data set of the
    Hugging Face hub: {"question", "subject", "choices", "answer": 2}. A letter as the answer is no
    text of a choice, as some choices are letters."""
    return plain.parse({**row, "answer": letter(row["answer"])})


def word(item: Item) -> str:
    choices = (f"{letter}. {c}\n" for letter, c in zip(LETTERS, item.choices, strict=False))
    return f"{item.question.strip()}\n{''.join(choices)}Answer:"
