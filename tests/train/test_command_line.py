"""Flags that cannot be read: one line each, whatever the terminal."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal

import pytest

from train import command_line, export, generate
from train.flags import require, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Some of each kind."""

    rows: Annotated[int, shown("N")] = 1
    """Rows, of which there may be as many as memory has room for, as this long text
    says in a second line, and no more."""
    rate: float = 1.0
    steps: int | None = None
    cap: float | None = None
    how: Literal["mean", "sum"] = "mean"
    kind: Literal["a", "b"] | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        require(self.rows > 0, f"--rows must be at least 1, not {self.rows}")


def read(line: str) -> Flags:
    return command_line.read(Flags, "python -m it", line.split())


@pytest.mark.parametrize("columns", ["30", "80", "300"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rows many", "--rows must be a whole number, not 'many'"),
        ("--rows 0", "--rows must be at least 1, not 0"),
        ("--rate it's", '--rate must be a number, not "it\'s"'),
        ("--steps x", "--steps must be a whole number, not 'x'"),
        ("--cap x", "--cap must be a number, not 'x'"),
        ("--how often", "--how must be one of mean, sum, not 'often'"),
        ("--kind of", "--kind must be one of None, a, b, not 'of'"),
        ("--row 3", "there is no flag --row: did you mean --rows?"),
        ("--zzzz 3", "there is no flag --zzzz: see python -m it --help"),
        ("--quick yes", "'yes' stands behind no flag: see python -m it --help"),
        ("--rows", "--rows needs a value: see python -m it --help"),
    ],
)
def test_a_mistake_is_one_line_with_what_to_do(line, message, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(line)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_what_is_right_is_read_and_help_is_printed(capsys):
    assert read("--rows 2 --how sum --quick") == Flags(rows=2, how="sum", quick=True)
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    assert "--no-quick" not in capsys.readouterr().out


def test_help_breaks_lines_where_they_are_full_and_not_as_the_source_does(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Nested:
        flags: Flags = dataclasses.field(default_factory=Flags)

    monkeypatch.setenv("COLUMNS", "200")
    for kind in (Flags, Nested):
        with pytest.raises(SystemExit):
            command_line.read(kind, "python -m it", ["--help"])
        assert "as this long text says in a second line, and no more." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (generate, [], "RUN|MODEL and --prompt TEXT must be given: see "),
        (export, ["run"], "FOLDER must be given: see "),
        (export, ["run", "out", "--dtype", "int8"], "--dtype must be one of None, bfloat16, "),
    ],
)
def test_every_command_says_it_so(command, arguments, message, capsys):
    program = f"python -m {command.__name__}"
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{program}: {message}")
    assert said.count("\n") == 1


def test_an_error_of_the_system_is_told_without_its_number():
    assert command_line.said(PermissionError(13, "Permission denied", "a.jsonl")) == (
        "a.jsonl: Permission denied"
    )
    assert command_line.said(OSError(28, "No space left on device")) == "No space left on device"
    assert command_line.said(OSError("in our words")) == "in our words"
