"""A user's own questions: {"question", "choices": […], "answer": 2 | "C" | the text}."""

from __future__ import annotations

from typing import Any

from train.evaluation.items import Item, answer_of
from train.flags import require


def matches(row: dict[str, Any]) -> bool:
    return "question" in row and "choices" in row and "answer" in row


def parse(row: dict[str, Any]) -> Item:
    """The answer is an index from 0, a letter, or the text of a choice. "context" may stand before
    the question, and "subject" and "id" name it."""
    choices = row["choices"]
    require(isinstance(choices, list), f"choices must be a list, not {choices!r}")
    return Item(
        row["question"],
        tuple(choices),
        answer_of(choices, row["answer"]),
        row.get("context") or "",
        str(row.get("subject") or ""),
        str(row.get("id") or ""),
    )


def word(item: Item) -> str:
    before = f"{item.context}\n" if item.context else ""
    return f"{before}Question: {item.question}\nAnswer:"
