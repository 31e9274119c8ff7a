"""What one training example is, how it is read from a JSONL file, and how records are divided.

A record is a conversation. The model learns to write what the assistant says in it, and only that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

Role = Literal["system", "user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation with at least one assistant message."""

    messages: tuple[Message, ...]
    source: str
    """Where it came from, for people: `data.jsonl:17`, `textwrap.wrap`."""
    kind: str = ""
    """Wrong answers of a multiple-choice question are taken from records of the same kind."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the first assistant message."""
        return self.messages[: self._first_assistant]

    @property
    def response(self) -> str:
        """What the assistant says first."""
        return self.messages[self._first_assistant].content

    @property
    def has_empty_response(self) -> bool:
        """Whether some assistant message says nothing: there is nothing good to learn from it."""
        return any(m.role == "assistant" and not m.content.strip() for m in self.messages)

    @property
    def _first_assistant(self) -> int:
        return next(i for i, message in enumerate(self.messages) if message.role == "assistant")


def read_jsonl(path: str | Path) -> list[Record]:
    """The records of a JSONL file, one JSON object a line; blank lines are skipped.

    The fields of an object say which of three formats it is in:

    - alpaca: `{"instruction": str, "input": str (may be absent or empty), "output": str}`
    - prompt and completion: `{"prompt": str, "completion": str}`
    - chat: `{"messages": [{"role": "system" | "user" | "assistant", "content": str}, …]}`

    Other fields are ignored. Records with an empty response are returned like any other
    (`Record.has_empty_response`), since published data sets hold some; the caller leaves them out.

    Raises:
      ValueError: naming file and line, for a line that is not UTF-8 or not a JSON object, a missing
        field, a field of the wrong type, an unknown role, or a chat in which the assistant never
        speaks; and for a file that is not there or has no records.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"--data: no file {path}")
    if path.is_dir():
        raise ValueError(f"--data: {path} is a folder, name the JSONL files in it")
    records = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            records.append(_parse_line(line, f"{path}:{number}"))
    if not records:
        raise ValueError(f"{path} holds no records: give a JSONL file, one JSON object a line")
    return records


def split(records: Sequence[Record], held_out: float = 0.1) -> tuple[list[Record], list[Record]]:
    """Divides records into `(train, held_out)`, each in the order given.

    The side of a record depends on nothing but a hash of its prompt, so records that ask the same
    thing land on the same side, and records added later move none of the others. About `held_out`
    of the prompts are held out; where there are two prompts or more, neither side is left empty.
    `held_out=0` keeps everything for training.

    Raises:
      ValueError: unless 0 ≤ held_out < 1, or when a held-out part is asked of a single prompt.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out!r}")
    if held_out == 0:
        return list(records), []
    hashes = [_prompt_hash(record) for record in records]
    if len(set(hashes)) < 2:
        raise ValueError(
            f"cannot hold out {held_out:g} of {len(records)} record(s) with fewer than two"
            " different prompts: give more data, or hold nothing out (--held-out 0)"
        )
    bound = max(round(held_out * 2**64), min(hashes) + 1)
    bound = min(bound, max(hashes))
    train = [record for record, key in zip(records, hashes, strict=True) if key >= bound]
    return train, [record for record, key in zip(records, hashes, strict=True) if key < bound]


def stable_hash(*parts: str) -> int:
    """A hash in [0, 2⁶⁴) that is the same in every process and on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def _prompt_hash(record: Record) -> int:
    return stable_hash(*(text for m in record.prompt for text in (m.role, m.content)))


def _parse_line(line: bytes, where: str) -> Record:
    def refuse(what: str) -> NoReturn:
        raise ValueError(f"{where}: {what}") from None

    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 ({error})")
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits
        refuse(f"invalid JSON ({error})")
    if not isinstance(fields, dict):
        refuse(f"expected a JSON object, got {_type_name(fields)}")
    # The first format that is there, whole if one is.
    there = [needed for needed in _FORMATS if fields.get(needed[0]) is not None]
    whole = [needed for needed in there if all(fields.get(name) is not None for name in needed)]
    for needed in whole or there:
        return Record(tuple(_FORMATS[needed](fields, refuse)), source=where)
    refuse(
        "none of the fields that tell the format: 'messages' (chat), 'prompt' (with 'completion')"
        f" or 'instruction' (alpaca, with 'output'); the fields are {sorted(fields)}"
    )


def _parse_chat(fields: dict[str, Any], refuse: Callable[[str], NoReturn]) -> Iterable[Message]:
    messages = fields["messages"]
    if not isinstance(messages, list):
        refuse(f"'messages' must be an array, got {_type_name(messages)}")
    parsed = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            refuse(f"'messages[{index}]' must be an object, got {_type_name(message)}")
        role = _text(message, "role", refuse, f"messages[{index}].role")
        if role not in get_args(Role):
            refuse(f"unknown role {role!r} in 'messages[{index}]': use one of {get_args(Role)}")
        content = _text(message, "content", refuse, f"messages[{index}].content")
        parsed.append(Message(cast(Role, role), content))
    if not any(message.role == "assistant" for message in parsed):
        refuse("no message has the role 'assistant', so there is no response to learn")
    return parsed


def _parse_prompt(fields: dict[str, Any], refuse: Callable[[str], NoReturn]) -> Iterable[Message]:
    yield Message("user", _text(fields, "prompt", refuse))
    yield Message("assistant", _text(fields, "completion", refuse))


def _parse_alpaca(fields: dict[str, Any], refuse: Callable[[str], NoReturn]) -> Iterable[Message]:
    instruction = _text(fields, "instruction", refuse)
    context = _text(fields, "input", refuse) if fields.get("input") is not None else ""
    yield Message("user", f"{instruction}\n\n{context}" if context else instruction)
    yield Message("assistant", _text(fields, "output", refuse))


_FORMATS = {
    ("messages",): _parse_chat,
    ("prompt", "completion"): _parse_prompt,
    ("instruction", "output"): _parse_alpaca,
}
"""By the fields that a record must have."""


def _text(
    fields: dict[str, Any], name: str, refuse: Callable[[str], NoReturn], shown: str | None = None
) -> str:
    shown = shown or name
    if name not in fields:
        refuse(f"missing field '{shown}'")
    value = fields[name]
    if not isinstance(value, str):
        refuse(f"'{shown}' must be a string, got {_type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(f"'{shown}' holds half of a surrogate pair, which is no character")
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]
