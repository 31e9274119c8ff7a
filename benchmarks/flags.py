"""Flags that several commands take, and how a command runs: each adds its own to these."""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import tyro

from benchmarks import inputs
from train import command_line


def shown(metavar: str, default: str | None = None, **options: Any) -> Any:
    """How --help writes a flag's values, and its default where that says too little."""
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, **options)


def shown_inputs(*more: str) -> Any:
    """How --help explains --inputs, with what a command takes besides."""
    return shown("NAME", help=f"What to measure on: {', '.join((*more, inputs.CHOICES))}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What every command can be told that writes rows."""

    json: Annotated[pathlib.Path | None, shown("FILE", "nowhere")] = None
    """Write the rows there."""
    commit: Annotated[str | None, shown("COMMIT", "git's answer")] = None
    """What rows record where the checkout has no git."""

    def check(self) -> None:
        """ValueError for a value that no row can come of."""
        for name, value in vars(self).items():
            if value == ():  # as after a pattern of the shell's that matches nothing
                raise ValueError(f"--{name.removesuffix('_files').replace('_', '-')} has no value")
        if self.json:
            check_new_file("--json", self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedFlags(Flags):
    """What every command can be told that times something."""

    seconds: Annotated[float, shown("S")] = 2.0
    """About how long to time each row."""

    def check(self) -> None:
        super().check()
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"--seconds must be finite and above 0, not {self.seconds:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFlags(TimedFlags):
    """What every command can be told that makes a table of rows."""

    from_files: Annotated[
        tuple[pathlib.Path, ...] | None, shown("FILE ...", "none", name="from")
    ] = None
    """Measure nothing; render the rows of these files."""

    def check(self) -> None:
        super().check()
        if self.from_files and self.json:
            raise ValueError(
                "--from measures nothing that --json could keep: leave one of them out"
            )


def check_at_least(least: int, flag: str, *values: int | None) -> None:
    """ValueError for a value below; None stands for a default."""
    for value in values:
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, not {value}")


def check_new_file(flag: str, path: pathlib.Path) -> None:
    """ValueError where no file can be written, folders and all: known before an hour is spent."""
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{flag} {path} would lie in {parent}, which is a file")


class Checked(Protocol):
    def check(self) -> None: ...


def parse[F: Checked](
    kind: type[F], module: str, about: str | None, arguments: Sequence[str] | None
) -> F:
    """A command's flags; its help begins with what the module says of itself.

    ValueError, in one line, for what is wrong; SystemExit after --help.
    """
    found = command_line.read(kind, f"python -m benchmarks.{module}", arguments, description=about)
    found.check()
    return found


def run[F](
    module: str,
    parse: Callable[[Sequence[str] | None], F],
    work: Callable[[F], int],
    arguments: Sequence[str] | None,
) -> int:
    """Parses and works: the exit status, 2 with one line on stderr for a user's mistake."""
    try:
        return work(parse(arguments))
    except (ValueError, OSError) as error:
        print(f"benchmarks.{module}: {command_line.said(error)}", file=sys.stderr)
        return 2
