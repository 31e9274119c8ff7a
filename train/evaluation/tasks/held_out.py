"""Multiple-choice questions made of held-out records: four real answers, of which one is right."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from train.data.records import Message, Record, stable_hash

OPTIONS = 4
MAX_OPTION_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Question:
    prompt: tuple[Message, ...]
    options: tuple[str, ...]
    answer: int
    """The index in `options` of the right one."""
    source: str


def questions(held_out: Sequence[Record], seed: int = 0) -> list[Question]:
    """A question for each held-out record of whose kind there are three others to be wrong with.

    The options are the first paragraphs of responses, at most 300 characters long. No two options
    of a question are equal, even but for case and spaces, and none of the wrong ones is an answer
    that some held-out record gives to the same prompt. A question is decided by `seed`, its record
    and the options there are of its kind, not by the order of the records.
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
            made.append(Question(record.prompt, tuple(options), answer, record.source))
    return made


def _option(record: Record) -> str:
    option = record.response.strip().partition("\n\n")[0].strip()
    if len(option) > MAX_OPTION_CHARACTERS:
        option = option[: MAX_OPTION_CHARACTERS + 1].rpartition(" ")[0].rstrip()
    return option


def _same(option: str) -> str:
    return " ".join(option.casefold().split())
