"""What the model answers to a few held-out prompts while it learns: `samples.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from train import files
from train.data.records import Record
from train.models.decoder import Decoder, looped
from train.models.generation import generate
from train.run.folder import SAMPLES
from train.text.tokenizer import Tokenizer

MOST_TOKENS = 64
"""Tokens of an answer, at most."""
MOST_CHARACTERS = 300
"""Shown of a prompt or an answer; the file has all of it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer after `step` steps, beside what the record says."""

    step: int
    prompt: str
    """The last message before the answer."""
    answer: str
    reference: str

    def __str__(self) -> str:
        lines = {"prompt": self.prompt, "answer": self.answer, "reference": self.reference}
        return f"step {self.step}: sample" + "".join(
            f"\n  {name + ':':<10} {textwrap.shorten(text, MOST_CHARACTERS, placeholder=' …')}"
            for name, text in lines.items()
        )


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The first held-out records that ask something."""

    records: Sequence[Record]
    tokens: Sequence[list[int]]
    """Their prompts, up to where the answer begins."""
    tokenizer: Tokenizer

    @classmethod
    def of(cls, records: Sequence[Record], count: int, tokenizer: Tokenizer, length: int) -> Self:
        """`count` of them, or as many as there are with a prompt of at most `length` tokens."""
        chosen: list[Record] = []
        prompts: list[list[int]] = []
        for record in records:
            if len(chosen) == count:
                break
            if not any(message.role == "user" for message in record.prompt):
                continue
            try:
                tokens = tokenizer.encode_prompt(record.prompt)
            except ValueError:  # of a template that asks for other turns than the data has
                continue
            if len(tokens) <= length:
                chosen.append(record)
                prompts.append(tokens)
        return cls(chosen, prompts, tokenizer)

    def answered(self, model: Decoder, step: int) -> list[Sample]:
        """What the model says, by the likeliest token each time: nothing is drawn."""
        if not self.records:
            return []
        stops, model = self.tokenizer.stops, looped(model)
        return [
            Sample(
                step,
                record.prompt[-1].content,
                self.tokenizer.decode(
                    list(generate(model, tokens, stops=stops, max_tokens=MOST_TOKENS))
                ),
                record.response,
            )
            for record, tokens in zip(self.records, self.tokens, strict=True)
        ]


def write(out: Path, step: int, samples: Sequence[Sample]) -> None:
    """Adds the samples of a step to samples.jsonl, in one atomic replacement.

    Samples of this step or later ones, left by a run that was cut off, are removed. ValueError for
    a line that is none.
    """
    path = out / SAMPLES
    before = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for number, line in enumerate(before, 1) if _step(line, path, number) < step]
    added = [json.dumps(vars(sample), ensure_ascii=False) + "\n" for sample in samples]
    if kept != before or added:
        files.write(path, "".join(kept + added))


def _step(line: str, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}:{number} is not a sample: remove the line") from None
