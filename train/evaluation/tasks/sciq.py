"""SciQ: science exam questions, each with a paragraph that supports it (Welbl et al., 2017).

https://arxiv.org/abs/1707.06209
"""

from __future__ import annotations

from typing import Any

from train.data.records import stable_hash
from train.evaluation.items import Item
from train.flags import require

WRONG = ("distractor1", "distractor2", "distractor3")


def matches(row: dict[str, Any]) -> bool:
    return "correct_answer" in row and "distractor1" in row


def parse(row: dict[str, Any]) -> Item:
    """The right answer stands where the question's text decides: the data name it apart."""
    missing = [name for name in ("question", *WRONG) if name not in row]
    require(not missing, f"{missing[:1]} is missing")
    choices = [row[name] for name in WRONG]
    answer = stable_hash(str(row["question"])) % 4
    choices.insert(answer, row["correct_answer"])
    support = row.get("support") or ""
    return Item(row["question"], tuple(choices), answer, support, name=str(row.get("id", "")))


def word(item: Item) -> str:
    return f"{item.context.lstrip()}\nQuestion: {item.question}\nAnswer:"
