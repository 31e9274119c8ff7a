"""What every command refuses before anything is measured, in one line with the value."""

import pathlib

import pytest

from benchmarks import everywhere, filter_error, loss, table, tune

MAIN = {
    "loss": loss.main,
    "table": table.main,
    "everywhere": everywhere.main,
    "tune": tune.main,
    "filter_error": filter_error.main,
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--json .", "--json . is a folder: name a file"),
        ("--json FILE/rows.json", "which is a file"),
        ("--n 0", "--n must be at least 1, not 0"),
    ],
)
@pytest.mark.parametrize(
    "command", ["loss", "table", "everywhere", "tune --case tiny", "filter_error folder"]
)
def test_what_every_command_refuses_before_anything_is_measured(
    command: str,
    flags: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
):
    (tmp_path / "file").touch()
    refused(f"{command} {flags.replace('FILE', str(tmp_path / 'file'))}", message, capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("loss --seed -1", "--seed must be at least 0, not -1"),
        ("table --seed -1", "--seed must be at least 0, not -1"),
        ("loss --seconds inf", "--seconds must be finite and above 0, not inf"),
        ("table --seconds 0", "--seconds must be finite and above 0, not 0"),
        ("tune --case tiny --seconds nan", "--seconds must be finite and above 0, not nan"),
        ("loss --devices 0", "--devices must be at least 1, not 0"),
        ("loss --label-smoothing", "--label-smoothing has no value"),
        ("tune --case", "--case has no value"),
        ("table --from", "--from has no value"),
        ("everywhere --from", "--from has no value"),
        ("everywhere --from a.json --json b.json", "--from measures nothing that --json"),
        ("table --from a.json --json b.json", "--from measures nothing that --json"),
        ("filter_error nothere", "nothere/hidden.npy: No such file or directory"),
        ("filter_error folder --v -5", "--v must be at least 1, not -5"),
        ("filter_error folder --power 1e9", "and at least -126, not 1e+09"),
        ("filter_error folder --power 0", "--power must be below 0, as -10 is, and at least -126"),
    ],
)
def test_wrong_values_are_refused_by_name(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
):
    refused(command, message, capsys)


def refused(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the command and the value."""
    name, *flags = command.split()
    assert MAIN[name](flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.{name}: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_flag_that_is_none_is_named(capsys: pytest.CaptureFixture[str]):
    refused("loss --smoothing 0.1", "there is no flag --smoothing", capsys)
    refused("loss --n many", "--n must be a whole number, not 'many'", capsys)
