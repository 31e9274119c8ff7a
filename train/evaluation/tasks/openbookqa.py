"""OpenBookQA: elementary science; the fact that helps is not shown (Mihaylov et al., 2018).

https://arxiv.org/abs/1809.02789
"""

from __future__ import annotations

from typing import Any

from train.evaluation.items import Item, labelled


def matches(row: dict[str, Any]) -> bool:
    """Its first release looks like ARC's, which a file of unknown task is taken for."""
    nested = isinstance(row.get("question"), dict)
    return "question_stem" in row or ("answerKey" in row and ("fact1" in row or nested))


def parse(row: dict[str, Any]) -> Item:
    """From {"question_stem", "choices": {"text", "label"}, "answerKey"}, or the first release's
    {"question": {"stem", "choices": [{"text", "label"}, …]}, "answerKey"}."""
    question, choices = row.get("question_stem"), row.get("choices")
    if isinstance(nested := row.get("question"), dict):
        question, choices = nested.get("stem"), nested.get("choices")
    texts, answer = labelled(choices, row.get("answerKey"))
    return Item(question or "", texts, answer, name=str(row.get("id", "")))


def word(item: Item) -> str:
    return item.question
