"""HellaSwag: which ending goes on from what was described (Zellers et al., 2019).

https://arxiv.org/abs/1905.07830
"""

from __future__ import annotations

import re
from typing import Any

from train.evaluation.items import Item
from train.flags import require


def matches(row: dict[str, Any]) -> bool:
    return "endings" in row and ("ctx" in row or "ctx_a" in row)


def parse(row: dict[str, Any]) -> Item:
    """From {"activity_label", "ctx_a", "ctx_b", "endings", "label"}, or "ctx" in place of its
    halves. The marks of WikiHow's headings are taken out."""
    endings, label = row["endings"], str(row.get("label", ""))
    require(isinstance(endings, list), f"endings must be a list, not {endings!r}")
    require(
        label.isdecimal(), f"the label {label!r} is no number: the test split is without answers"
    )
    halves = row.get("ctx_a"), row.get("ctx_b")
    if isinstance(halves[0], str) and isinstance(halves[1], str):
        context = f"{halves[0]} {halves[1].capitalize()}"
    else:
        context = str(row.get("ctx", ""))
    activity = row.get("activity_label")
    question = clean(f"{activity}: {context}" if activity else context)
    choices = tuple(clean(e) if isinstance(e, str) else e for e in endings)
    return Item(question, choices, int(label), name=str(row.get("ind", "")))


def clean(text: str) -> str:
    """As lm-evaluation-harness cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def word(item: Item) -> str:
    return item.question
