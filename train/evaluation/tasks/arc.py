"""ARC, Easy and Challenge: school science questions (Clark et al., 2018).

https://arxiv.org/abs/1803.05457
"""

from __future__ import annotations

from typing import Any

from train.evaluation.items import Item, labelled


def matches(row: dict[str, Any]) -> bool:
    return "answerKey" in row and "question" in row and "fact1" not in row


def parse(row: dict[str, Any]) -> Item:
    """From {"question", "choices": {"text", "label"}, "answerKey"}, or the first release's
    {"question": {"stem", "choices": [{"text", "label"}, …]}, "answerKey"}."""
    question = row["question"]
    if isinstance(question, dict):
        choices, question = question.get("choices"), question.get("stem")
    else:
        choices = row.get("choices")
    texts, answer = labelled(choices, row["answerKey"])
    return Item(question or "", texts, answer, name=str(row.get("id", "")))


def word(item: Item) -> str:
    return f"Question: {item.question}\nAnswer:"
