"""Default settings beside optax at several N, on a CPU: what is measured and how it is shown."""

import dataclasses
import pathlib

import numpy as np
import pytest

from benchmarks import everywhere
from benchmarks.inputs import cases, real
from benchmarks.measure import report
from benchmarks.measure.report import Report


@pytest.fixture(scope="module")
def measured() -> Report:
    return everywhere.measure("tiny", (64, 32), seconds=0.01, commit="abc")


def test_both_run_at_each_n_on_the_same_tokens(measured: Report):
    assert not measured.skipped
    assert [(row.n, row.run) for row in measured.rows] == [
        (n, run) for n in (32, 64) for run in (everywhere.OURS, everywhere.NAIVE)
    ]
    for ours, naive in zip(measured.rows[::2], measured.rows[1::2], strict=True):
        assert ours.loss == pytest.approx(naive.loss, rel=1e-2)
        assert ours.inputs == naive.inputs == "like smollm"
        assert ours.commit == "abc"


def test_the_table_has_a_line_for_each_n(measured: Report):
    text = everywhere.markdown(measured)
    assert text.count("| tiny |") == 2
    assert "commit abc" in text
    ours, naive = measured.rows[:2]
    assert f"| {naive.p50_ms / ours.p50_ms:.2f} × |" in text


def test_errors_are_measured_and_shown_where_they_are_asked_for(measured: Report):
    assert all(row.hidden_error is None for row in measured.rows)
    assert "dE" not in everywhere.markdown(measured)
    with_errors = everywhere.measure("tiny", (64,), seconds=0.01, commit="abc", errors=True)
    for row in with_errors.rows:
        assert row.hidden_error is not None
        assert row.head_error is not None
        assert 1e-6 < row.hidden_error < 0.05
        assert 1e-6 < row.head_error < 0.05
    ours, naive = with_errors.rows
    both = f"| {naive.hidden_error:.4f}, {naive.head_error:.4f} | {ours.hidden_error:.4f}, "
    text = everywhere.markdown(measured + with_errors)
    assert both in text
    assert "–" in text


def test_the_last_measurement_counts(measured: Report):
    again = dataclasses.replace(measured.rows[0], matmul_ratio=12.34, commit="def")
    text = everywhere.markdown(measured + Report(rows=(again,)))
    assert "| 12.34 |" in text
    assert text.count("| tiny |") == 2
    assert "commit abc, def" in text


def test_real_activations_come_from_a_folder(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    rng = np.random.default_rng(0)
    d, v = 96, 1021
    np.save(tmp_path / "hidden.npy", rng.integers(0x3F00, 0x3F80, (40, d)).astype(np.uint16))
    np.save(tmp_path / "labels.npy", rng.integers(0, v, 40).astype(np.int32))
    np.save(tmp_path / "head_q0.npy", rng.integers(-9, 9, (v, d)).astype(np.int8))
    np.save(tmp_path / "head_scales.npy", np.full((v, d // 32), 0.01, np.float16))
    assert len(real.read(tmp_path).labels) == 40
    command = ["--case", "tiny", "--n", "32", "--real", f"tiny={tmp_path}"]
    assert everywhere.main(command) == 2
    assert "holds a head (1021, 96), not (1021, 72) of tiny" in capsys.readouterr().err
    monkeypatch.setitem(cases.CASES, "tiny", cases.Case("tiny", 127, d, v))
    measured = everywhere.measure("tiny", (32, 64), seconds=0.01, commit="abc", folder=tmp_path)
    assert [(row.n, row.inputs) for row in measured.rows] == [(32, "real")] * 2
    assert "holds 40 tokens, not 64" in everywhere.markdown(measured)


def test_command_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.json"
    command = ["--case", "tiny", "--n", "64", "--seconds", "0.01", "--json", str(path)]
    assert everywhere.main(command) == 0
    printed = capsys.readouterr().out
    assert len(report.read(path).rows) == 2
    assert everywhere.main(["--from", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_mistakes_are_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert everywhere.main(["--case", "gemma9"]) == 2
    assert "gemma9" in capsys.readouterr().err
    assert everywhere.main(["--from", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    for flags, message in (
        (["--gradient-filter", "eight"], "gradient filter 'eight'"),
        (["--real", "somewhere"], "--real somewhere must be CASE=FOLDER"),
        (["--real", f"gemma2-2b={tmp_path}"], f"there is no {tmp_path / 'hidden.npy'}"),
        (["--real", f"tiny={tmp_path}"], f"--real tiny={tmp_path}, but --case is gemma2-2b"),
    ):
        assert everywhere.main(flags) == 2
        assert message in capsys.readouterr().err


def test_other_rows_of_a_file_are_not_taken_for_these(
    measured: Report, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    ours = measured.rows[0]
    fused = dataclasses.replace(ours.run.settings, gradient_filter="fused")
    other = dataclasses.replace(
        ours, run=dataclasses.replace(ours.run, settings=fused), matmul_ratio=12.34
    )
    path = tmp_path / "rows.json"
    report.write(measured + Report(rows=(other,)), path)
    assert everywhere.main(["--from", str(path)]) == 0
    assert capsys.readouterr().out == everywhere.markdown(measured) + "\n"
    report.write(Report(rows=(other, measured.rows[1])), path)  # of ours none, though of optax
    assert everywhere.main(["--from", str(path)]) == 2
    assert "with the same --gradient-filter and --precision?" in capsys.readouterr().err
    assert everywhere.main(["--from", str(path), "--gradient-filter", "fused"]) == 0
