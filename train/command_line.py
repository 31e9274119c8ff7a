"""A command line to a dataclass of flags; a mistake in it is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

import docstring_parser
import tyro

from train import start

KINDS = {"int": "a whole number", "float": "a number"}


def read[F](
    kind: type[F],
    program: str,
    arguments: Sequence[str] | None,
    config: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff,),
    **options: Any,
) -> F:
    """`tyro.cli`, but what it shows in a box and exits with is an error for the caller to show.

    Args:
      kind: the dataclass.
      program: what was typed before the flags, `python -m train`.
      arguments: the flags; None for those of this process.
      config: tyro's markers; without any, no switch has a --no- beside it.
      options: of `tyro.cli`.

    Raises:
      ValueError: in one line, with what to do, for flags that are unknown, missing or wrong.
      SystemExit: after --help.
    """
    _join_lines(kind)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, config=config, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    except BrokenPipeError:  # nobody reads the help
        sys.exit(start.NOBODY_READS)
    raise ValueError(in_one_line(said.getvalue(), program))


def said(error: Exception) -> str:
    """What a user is told of an error: of the system's own, the reason and the file, if any."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def in_one_line(box: str, program: str) -> str:
    """What a box of tyro's says, in our words where a user meets it often."""
    # The message stands below the title, and a rule where there are no characters for boxes.
    lines = [line.strip("│|").rstrip() for line in box.splitlines()[1:]]
    below = list(itertools.dropwhile(_is_rule, lines))
    message = list(itertools.takewhile(lambda line: not _is_rule(line), below))
    first = " ".join(" ".join(message).split())
    see = f"see {program} --help"

    if found := re.match(r"Unrecognized options: ([^\s,]+)", first):
        name = found[1].partition("=")[0]
        if not name.startswith("-"):
            return f"{name!r} stands behind no flag: {see}"
        near = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(below))
        return f"there is no flag {name}: " + (f"did you mean {near[1]}?" if near else see)
    if found := re.match(r"Missing value for argument '([^']+)'", first):
        return f"{found[1]} needs a value: {see}"
    if found := re.match(r"invalid choice (.+) for argument '([^']+)'\. .*\((.*)\)", first):
        choices = sorted(set(re.findall(r"'([^']*)'", found[3])))
        return f"{found[2]} must be one of {', '.join(choices)}, not {found[1]}"
    if first.startswith("Missing from "):
        names = [line.strip() for line in message if re.match(r"\s{3,6}\S", line)]
        return f"{' and '.join(names)} must be given: {see}"
    if found := re.match(r"Error parsing (-\S+): (.*)", first):
        name, reason = found.groups()
        kind = re.search(r"\b(int|float)\b", reason, re.IGNORECASE)
        values = re.findall(r"(['\"])(.*?)\1", reason)
        if kind and values:
            return f"{name} must be {KINDS[kind[1].lower()]}, not {values[-1][1]!r}"
        return f"{name}: {reason}: {see}"
    # Ours, which tyro puts behind the name of the dataclass that raised it.
    return re.sub(r"^Error parsing \w+: ", "", first)


def _join_lines(kind: type) -> None:
    """Makes one line of each field's docstring, of which tyro keeps the line breaks."""
    documented = docstring_parser.parse_from_object(kind).params
    text = {p.arg_name: " ".join((p.description or "").split()) for p in documented}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in text:
            field.metadata = types.MappingProxyType(field.metadata | {"help": text[field.name]})
        if dataclasses.is_dataclass(hints[field.name]):
            _join_lines(hints[field.name])


def _is_rule(line: str) -> bool:
    return not line.strip(" ─-+╰╯")
