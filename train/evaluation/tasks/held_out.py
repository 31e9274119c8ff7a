"""What is held out of training: its tokens, and multiple-choice questions made of it.

A question offers four real answers, of which one is right.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Self

import numpy as np

from train.data.dataset import Data
from train.data.packing import Rows
from train.data.records import Message, Record, stable_hash
from train.text.tokenizer import Tokenizer

OPTIONS = 4
MAX_OPTION_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Question:
    prompt: tuple[Message, ...]
    """The conversation so far, none of which is scored."""
    options: tuple[str, ...]
    answer: int
    """The index in `options` of the right one."""
    source: str


@dataclasses.dataclass(frozen=True)
class Exam:
    """What a run is scored on."""

    tokenizer: Tokenizer
    held_out: Rows
    """Records, of which the response tokens are predicted."""
    questions: Sequence[Question]

    @classmethod
    def of(cls, data: Data, seed: int) -> Self:
        """The exam on what a run's data keeps from training; `seed` is of the questions."""
        return cls(data.tokenizer, data.held_out, questions(data.held_out_records, seed))


def questions(held_out: Sequence[Record], seed: int = 0) -> list[Question]:
    """A question for each held-out record of whose kind there are three others to be wrong with.

    The options are the first paragraphs of responses, at most 300 characters long. No two options
    of a question are equal, even but for case and spaces, and none of the wrong ones is an answer
    that some held-out record gives to the same prompt. A question is decided by `seed`, its record
    and the options there are of its kind, not by the order of the records. What nobody asks for,
    as plain text, makes no question.
    """
    options_of_kind: dict[str, dict[str, str]] = defaultdict(dict)
    answers_of_prompt: dict[tuple[Message, ...], set[str]] = defaultdict(set)
    for record in sorted(held_out, key=_option):
        option = _option(record)
        if option:
            options_of_kind[record.kind].setdefault(_same(option), option)
            answers_of_prompt[record.prompt].add(_same(option))
    pools = {kind: list(options.items()) for kind, options in options_of_kind.items()}

    made = []
    for record in held_out:
        right = _option(record)
        if not right:
            continue
        pool, answers = pools[record.kind], answers_of_prompt[record.prompt]
        words = (text for message in record.messages for text in (message.role, message.content))
        random = np.random.default_rng([seed, stable_hash(*words)])
        order = random.permutation(len(pool))
        wrong = itertools.islice(
            (pool[i][1] for i in order if pool[i][0] not in answers), OPTIONS - 1
        )
        options = [right, *wrong]
        if len(options) == OPTIONS:
            answer = int(random.integers(OPTIONS))
            options[0], options[answer] = options[answer], options[0]
            made.append(Question(_unscored(record.prompt), tuple(options), answer, record.source))
    return made


def _unscored(prompt: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(dataclasses.replace(m, learn=m.role != "assistant") for m in prompt)


def _option(record: Record) -> str:
    """The beginning of the response, unchanged: what is scored is what training text begins with.

    A cut is made where there are blanks, if there are any in the last fifth of what may be kept.
    """
    response = record.response
    if not record.prompt or not response.strip():
        return ""
    paragraph = response.find("\n\n", len(response) - len(response.lstrip()))
    option = response if paragraph < 0 else response[:paragraph].rstrip()
    if len(option) > MAX_OPTION_CHARACTERS:
        near = range(MAX_OPTION_CHARACTERS, MAX_OPTION_CHARACTERS * 4 // 5, -1)
        cut = next((i for i in near if option[i].isspace()), MAX_OPTION_CHARACTERS)
        option = option[:cut].rstrip()
    return option


def _same(option: str) -> str:
    return " ".join(option.casefold().split())
