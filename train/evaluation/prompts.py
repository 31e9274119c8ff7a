"""From a question to text: what stands before the choices, and what may follow.

| | "hendrycks" | "harness" |
| --- | --- | --- |
| after | the code published with MMLU, https://github.com/hendrycks/test | lm-evaluation-harness |
| header | "… (with answers) about  anatomy.\\n\\n": two blanks | MMLU: the same with one |
| question | the question, its choices by letter, "Answer:" | the task's own words |
| answer | its letter | MMLU: its letter; else its text |

Every answer comes after one blank. Solved examples stand before the question, each followed by an
empty line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from train.evaluation.items import LETTERS, Item
from train.evaluation.tasks import Page, mmlu
from train.flags import require

Prompt = Literal["hendrycks", "harness"]
Answer = Literal["letters", "text"]

HEADER = "The following are multiple choice questions (with answers)"


class Worded(NamedTuple):
    context: str
    continuations: tuple[str, ...]


def answer_by(page: Page, prompt: Prompt, answer: Answer | None) -> Answer:
    """How choices are scored; ValueError for letters where the prompt shows none."""
    shown = prompt == "hendrycks" or page is mmlu
    require(
        shown or answer != "letters",
        "--prompt harness shows no letters here: --prompt hendrycks does, or leave out --answer",
    )
    return answer or ("letters" if shown else "text")


def word(
    item: Item, examples: Sequence[Item], page: Page, prompt: Prompt, answer: Answer
) -> Worded:
    """The text before the choices and the choices themselves, after so many solved examples."""
    question = _hendrycks if prompt == "hendrycks" else page.word
    solved = "".join(
        f"{question(example)}{continuations(example, answer)[example.answer]}\n\n"
        for example in examples
    )
    return Worded(header(item, page, prompt) + solved + question(item), continuations(item, answer))


def continuations(item: Item, answer: Answer) -> tuple[str, ...]:
    texts = LETTERS[: len(item.choices)] if answer == "letters" else item.choices
    return tuple(f" {text}" for text in texts)


def header(item: Item, page: Page, prompt: Prompt) -> str:
    words = item.subject.replace("_", " ")
    if prompt == "hendrycks":
        return f"{HEADER} about  {words}.\n\n" if words else f"{HEADER}.\n\n"
    return f"{HEADER} about {words}.\n\n" if page is mmlu and words else ""


def _hendrycks(item: Item) -> str:
    before = f"{item.context}\n" if item.context else ""
    choices = (f"\n{letter}. {c}" for letter, c in zip(LETTERS, item.choices, strict=False))
    return f"{before}{item.question}{''.join(choices)}\nAnswer:"
