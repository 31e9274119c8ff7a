"""The formats that a record may have in a file: a function each, and the table of them.

A function takes the fields of one JSON object and gives the messages of a record. What it cannot
take is a ValueError that names the field; the caller adds file and line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from train.data.records import Message, Role

Fields = Mapping[str, Any]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Who speaks, by the names in use: OpenAI's, then ShareGPT's."""
TOOL_ROLES = frozenset(
    ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
)
TOOL_FIELDS = ("tools", "functions", "tool_calls", "function_call")


def chat(fields: Fields) -> Sequence[Message]:
    """`{"messages": [{"role": "system" | "user" | "assistant", "content": str}, …]}`"""
    return _with_response(_turns(fields, "messages"))


def sharegpt(fields: Fields) -> Sequence[Message]:
    """`{"conversations": [{"from": "system" | "human" | "gpt", "value": str}, …]}`"""
    return _with_response(_turns(fields, "conversations"))


def prompt_completion(fields: Fields) -> Sequence[Message]:
    """`{"prompt": str, "completion": str}`, or either a list of messages, as TRL has them.

    What the assistant says in the prompt is not learned.
    """
    prompt = _said(fields, "prompt", "user")
    completion = _said(fields, "completion", "assistant")
    given = [dataclasses.replace(m, learn=m.role != "assistant") for m in prompt]
    return [*given, *_with_response(completion, "'completion'")]


def alpaca(fields: Fields) -> Sequence[Message]:
    """`{"instruction": str, "input": str (may be absent or empty), "output": str}`"""
    instruction = _text(fields, "instruction")
    context = _text(fields, "input") if fields.get("input") is not None else ""
    return [
        Message("user", f"{instruction}\n\n{context}" if context else instruction),
        Message("assistant", _text(fields, "output")),
    ]


def text(fields: Fields) -> Sequence[Message]:
    """`{"text": str}`: plain text, all of which is learned."""
    return [Message("text", _text(fields, "text"))]


FORMATS: dict[tuple[str, ...], Callable[[Fields], Sequence[Message]]] = {
    ("messages",): chat,
    ("conversations",): sharegpt,
    ("prompt", "completion"): prompt_completion,
    ("instruction", "output"): alpaca,
    ("text",): text,
}
"""By the fields that a record must have. The first whose fields are all there is taken."""


def parse(value: Any) -> tuple[Message, ...]:
    """The messages of one record, whatever its format. Other fields are ignored.

    Raises:
      ValueError: for what is no JSON object, no known format, a missing field or one of the wrong
        type, an unknown role, tool calls, or a conversation without a response to learn.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a JSON object, got {_type_name(value)}")
    _refuse_tools(value, "")
    there = [needed for needed in FORMATS if value.get(needed[0]) is not None]
    whole = [needed for needed in there if all(value.get(name) is not None for name in needed)]
    for needed in whole or there:
        return tuple(FORMATS[needed](value))
    known = ", ".join(" with ".join(map(repr, needed)) for needed in FORMATS)
    raise ValueError(
        f"none of the fields that tell the format: {known}; the fields are {sorted(value)}"
    )


def _said(fields: Fields, name: str, role: Role) -> list[Message]:
    """A list of messages, or a string that is one."""
    if isinstance(fields.get(name), list):
        return _turns(fields, name)
    return [Message(role, _text(fields, name))]


def _turns(fields: Fields, name: str) -> list[Message]:
    turns = fields[name]
    if not isinstance(turns, list):
        raise ValueError(f"'{name}' must be an array, got {_type_name(turns)}")
    return [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, name: str) -> Message:
    """One message, in OpenAI's words or in ShareGPT's."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"'{name}' must be an object, got {_type_name(turn)}")
    _refuse_tools(turn, f"{name}.")
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    role = _text(turn, who, f"{name}.{who}")
    if role in TOOL_ROLES:
        _no_tools(f"'{name}' has the role {role!r}")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r} in '{name}': use one of {', '.join(ROLES)}")
    weight = 1 if turn.get("weight") is None else turn["weight"]
    if weight not in (0, 1):
        raise ValueError(f"'{name}.weight' must be 0 or 1, got {weight!r}")
    learn = weight == 1 or ROLES[role] != "assistant"
    return Message(ROLES[role], _content(turn, what, f"{name}.{what}"), learn)


def _content(turn: Fields, field: str, name: str) -> str:
    """A string, or a list of parts that are all text."""
    parts = turn.get(field)
    if not isinstance(parts, list):
        return _text(turn, field, name)
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise ValueError(f"'{name}[{index}]' must be an object, got {_type_name(part)}")
        if part.get("type") != "text":
            raise ValueError(
                f"'{name}[{index}]' is of the type {part.get('type')!r}: only text can be learned"
            )
    return "".join(_text(part, "text", f"{name}[{i}].text") for i, part in enumerate(parts))


def _with_response(messages: list[Message], where: str = "the record") -> list[Message]:
    if not any(message.role == "assistant" for message in messages):
        raise ValueError(
            f"no message of {where} has the role 'assistant', so there is no response to learn"
        )
    if not any(message.has_loss for message in messages):
        raise ValueError("every assistant message has weight 0, so there is no response to learn")
    return messages


def _refuse_tools(fields: Fields, name: str) -> None:
    for field in TOOL_FIELDS:
        if fields.get(field) not in (None, [], {}, "", "[]"):
            _no_tools(f"'{name}{field}' is there")


def _no_tools(what: str) -> NoReturn:
    raise ValueError(f"tool calls are not supported: {what}")


def _text(fields: Fields, name: str, shown: str | None = None) -> str:
    shown = shown or name
    if name not in fields:
        raise ValueError(f"missing field '{shown}'")
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"'{shown}' must be a string, got {_type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"'{shown}' holds half of a surrogate pair, which is no character"
        ) from None
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")  # the latter in Parquet
