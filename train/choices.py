"""Multiple-choice questions made of held-out records: four real answers, of which one is right."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from train.records import Message, Record, stable_hash

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

    The options are the first paragraphs of responses, at most 300 characters long. The wrong ones
    belong to other held-out records of the same kind with other prompts; no two options are equal,
    even but for case and space, and where the kind has enough of them no wrong option is right for
    another record that asks the same thing. A question depends on `seed`, its record and the set of
    options of that kind, and not on the order of the records.
    """
    options_of_kind: dict[str, dict[str, str]] = defaultdict(dict)
    for record in sorted(held_out, key=lambda record: (_option(record), record.source)):
        option = _option(record)
        if option:
            options_of_kind[record.kind].setdefault(_same(option), option)
    answers_of_prompt: dict[tuple[Message, ...], set[str]] = defaultdict(set)
    for record in held_out:
        answers_of_prompt[record.prompt].add(_same(_option(record)))

    made = []
    for record in held_out:
        right = _option(record)
        if not right:
            continue
        pool = options_of_kind[record.kind]
        wrong = [o for key, o in pool.items() if key not in answers_of_prompt[record.prompt]]
        if len(wrong) < OPTIONS - 1:
            continue
        texts = (text for m in record.messages for text in (m.role, m.content))
        random = np.random.default_rng([seed, stable_hash(*texts)])
        chosen = [wrong[i] for i in random.choice(len(wrong), OPTIONS - 1, replace=False)]
        answer = int(random.integers(OPTIONS))
        options = (*chosen[:answer], right, *chosen[answer:])
        made.append(Question(record.prompt, options, answer, record.source))
    return made


def _option(record: Record) -> str:
    option = record.response.strip().partition("\n\n")[0].strip()
    if len(option) > MAX_OPTION_CHARACTERS:
        option = option[: MAX_OPTION_CHARACTERS + 1].rpartition(" ")[0].rstrip()
    return option


def _same(option: str) -> str:
    return " ".join(option.casefold().split())
