"""The command that measures a grid of runs."""

import pathlib

import pytest

from benchmarks import loss
from benchmarks.measure import report


@pytest.mark.slow
def test_one_command_measures_the_whole_grid(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "rows.json"
    command = "--n 8 16 --implementation chunked naive --mode fwdbwd --label-smoothing 0 0.1"
    assert loss.main([*command.split(), "--errors", "--seconds", "0.01", "--json", str(path)]) == 0
    outcome = report.read(path)
    grid = {(row.n, row.run) for row in outcome.rows}
    assert len(grid) == len(outcome.rows) == 8
    assert {row.n for row in outcome.rows} == {8, 16}
    assert all(row.head_error is not None and row.head_error < 1e-5 for row in outcome.rows)
    assert "bare matmul" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--case huge", "no case 'huge'; must be DxV or one of gemma2-2b"),
        ("--implementation fast", "no implementation 'fast'; must be any of auto"),
        (
            "--implementation liger",
            "'liger' runs in PyTorch, which python -m benchmarks.table meas",
        ),
        ("--gradient-filter some", "must be auto, none (exact), fused, hidden, fp8 or a number"),
        ("--inputs spiky", "must be one of flat, peaked"),
        ("--inputs absent.npz", "absent.npz"),
        ("--dtype int8", "must be one of bfloat16, float32"),
        ("--label-smoothing 0 2", "label smoothing must be in [0, 1], not 2.0"),
        ("--label-smoothing nan", "label smoothing must be in [0, 1], not nan"),
        ("--softcap 0", "softcap must be finite and above 0, not 0.0"),
        ("--gradient-filter 1", "gradient filter must be in [0, 1), not 1.0"),
        ("--devices 1000", "1000 devices asked for; this machine has"),
    ],
)
def test_a_wrong_flag_is_named_with_the_valid_values(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert loss.main(flags.split()) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_mode_is_named_with_the_valid_ones(capsys: pytest.CaptureFixture[str]):
    assert loss.main(["--mode", "bwd"]) == 2
    said = capsys.readouterr().err
    assert "'bwd'" in said
    assert "fwdbwd" in said


def test_a_run_without_any_row_fails(capsys: pytest.CaptureFixture[str]):
    command = "--implementation naive-integer --mode fwd --label-smoothing 0.1"
    assert loss.main(command.split()) == 1
    assert "has no smoothing" in capsys.readouterr().out
