"""What one training example is, and how records are divided into training and held-out ones.

A record is a conversation, or plain text. The model learns to write what the assistant says in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Literal

logger = logging.getLogger(__name__)

Role = Literal["system", "user", "assistant", "text"]
"""Who says it; "text" is nobody, the one message of a record of plain text."""

SHARE_TOLERANCE = 0.03
"""How far the held-out share of all records may be from the one asked for, without a word."""


@dataclasses.dataclass(frozen=True)
class Message:
    role: Role
    content: str
    learn: bool = True
    """False where the assistant says what the model is not to learn: a turn of weight 0."""

    @property
    def has_loss(self) -> bool:
        return self.learn and self.role in ("assistant", "text")


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation with at least one message to learn, or plain text."""

    messages: tuple[Message, ...]
    source: str
    """Where it came from, for people: `data.jsonl:17`, `textwrap.wrap`."""
    kind: str = ""
    """Wrong answers of a multiple-choice question are taken from records of the same kind."""

    @property
    def is_text(self) -> bool:
        return self.messages[0].role == "text"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before `response`."""
        return self.messages[: self._turn]

    @property
    def response(self) -> str:
        """What the assistant says first after the user has spoken: a greeting answers nothing."""
        return self.messages[self._turn].content

    @property
    def question(self) -> tuple[Message, ...]:
        """What tells this record from others: its prompt, or all of it where no user asks."""
        asked = any(message.role == "user" for message in self.prompt)
        return self.prompt if asked else self.messages

    @property
    def has_empty_response(self) -> bool:
        """Whether some message to learn says nothing: there is nothing good to learn from it."""
        return any(message.has_loss and not message.content.strip() for message in self.messages)

    @property
    def _turn(self) -> int:
        learned = [i for i, message in enumerate(self.messages) if message.has_loss]
        users = [i for i, message in enumerate(self.messages) if message.role == "user"]
        return next((i for i in learned if users and i > users[0]), learned[0])


def split(records: Sequence[Record], held_out: float = 0.1) -> tuple[list[Record], list[Record]]:
    """Divides records into `(train, held_out)`, each in the order given.

    The side of a record depends on a hash of its question, so records that ask the same thing land
    on the same side, and records added later move none of the others. About `held_out` of the
    questions are held out, but none that more than this share of all records ask; where there are
    two questions or more, neither side is left empty. A share that is far from the one asked for,
    as with few questions, is said in a warning. `held_out=0` keeps everything for training.

    Raises:
      ValueError: unless 0 ≤ held_out < 1, or when a held-out part is asked of a single question.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out!r}")
    if held_out == 0:
        return list(records), []
    hashes = [_hash(record.question) for record in records]
    sizes = Counter(hashes)
    if len(sizes) < 2:
        raise ValueError(
            f"cannot hold out {held_out:g} of {len(records)} record(s) with fewer than two"
            " different prompts: give more data, or hold nothing out (--held-out 0)"
        )
    wanted = held_out * len(records)
    small = {key for key, size in sizes.items() if size <= max(wanted, 1)} or {
        min(sizes, key=lambda key: (sizes[key], key))
    }
    bound = max(round(held_out * 2**64), min(small) + 1)
    chosen = {key for key in small if key < bound}
    if len(chosen) == len(sizes):
        chosen.remove(max(chosen))
    train = [record for record, key in zip(records, hashes, strict=True) if key not in chosen]
    kept_back = [record for record, key in zip(records, hashes, strict=True) if key in chosen]
    if abs(len(kept_back) - wanted) > SHARE_TOLERANCE * len(records):
        logger.warning(
            "held out %d of %d records, %.1f%% where %.1f%% was asked for: a hash of the prompt"
            " decides, and there are only %d prompts, the most frequent in %d record(s)",
            len(kept_back),
            len(records),
            100 * len(kept_back) / len(records),
            100 * held_out,
            len(sizes),
            max(sizes.values()),
        )
    return train, kept_back


def stable_hash(*parts: str) -> int:
    """A hash in [0, 2⁶⁴) that is the same in every process and on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def _hash(messages: Sequence[Message]) -> int:
    return stable_hash(*(text for m in messages for text in (m.role, m.content)))
