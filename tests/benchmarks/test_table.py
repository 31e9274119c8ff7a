"""The table of all peers: one process a framework, absent peers skipped, markdown that adds up."""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable

import pytest
from paths import ROOT

from benchmarks import everywhere, table
from benchmarks.frameworks import worker
from benchmarks.implementations.settings import Run, Settings
from benchmarks.inputs import cases, random
from benchmarks.measure import report
from benchmarks.measure.report import Report, Row, Skipped

TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.slow
def test_the_tiny_case_runs_on_a_cpu(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tested = {"jax": ("auto", "naive", "jax-cce"), "torch": ("torch-eager", "liger")}
    lines = [line for line in table.LINES if line.implementation in tested[line.framework]]
    monkeypatch.setattr(table, "LINES", [line for line in lines if not line.settings.vocab_order])
    path = tmp_path / "table.json"
    flags = "--case tiny --n 16 --dtype float32 --seconds 0.01 --json"
    command = [*flags.split(), str(path)]
    assert table.main(command) == 0
    text = capsys.readouterr().out
    measured = report.read(path)
    done = {(row.run.implementation, row.run.mode) for row in measured.rows}
    assert {("auto", "fwd"), ("auto", "fwdbwd"), ("naive", "fwdbwd")} <= done
    for row in measured.rows:
        if row.run.mode == "fwdbwd":
            assert row.head_error is not None
            assert row.head_error < 1e-5
    losses = {
        beta: [row.loss for row in measured.rows if row.run.settings.label_smoothing == beta]
        for beta in (0.0, table.LABEL_SMOOTHING)
    }
    for same in losses.values():
        assert max(same) - min(same) < 1e-5
    assert min(losses[table.LABEL_SMOOTHING]) > max(losses[0.0])
    every = {run for framework in worker.FRAMEWORKS for run in table.runs_of(framework)}
    assert {x.run for x in (*measured.rows, *measured.skipped)} == every
    if not TORCH:
        assert "No module named 'torch'" in text
    assert table.main(["--from", str(path)]) == 0
    assert capsys.readouterr().out == text


def row(run: Run, **changes: object) -> Row:
    blank: dict[str, object] = {field.name: "" for field in dataclasses.fields(Row)}
    numbers = {
        "n": 8192, "d": 2304, "v": 256000, "loss": 1.0, "p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0,
        "samples": 5, "launches": 1, "temporary_mb": 1.0, "output_mb": 1.0, "extra_mb": 2.0,
        "tflops": 1.0, "matmul_ms": 14.0, "matmul_ratio": 1.0, "matmul_share": 1.0,
        "hidden_error": None, "head_error": None,
    }  # fmt: skip
    return Row(**(blank | numbers | {"run": run} | changes))  # pyright: ignore[reportArgumentType]


def test_an_interrupted_table_keeps_its_rows(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    runs = tuple(table.runs_of("jax"))

    path = tmp_path / "table.json"

    def interrupted(command: list[str], meanwhile: Callable[[], object]) -> None:
        folder = pathlib.Path(command[-1])
        report.write(Report(rows=(row(runs[0]),)), worker.report_path("jax", folder))
        meanwhile()
        assert [found.run for found in report.read(path).rows] == [runs[0]]
        path.unlink()
        raise SystemExit(143)

    monkeypatch.setattr(table, "watched", interrupted)
    tiny = random.make("flat", cases.CASES["tiny"], "bfloat16")
    with pytest.raises(SystemExit):
        table.measure(tiny, "tiny", 0.01, "abc", ("jax",), json=path)
    measured = report.read(path)
    assert [found.run for found in measured.rows] == [runs[0]]
    assert {(skipped.run, skipped.reason) for skipped in measured.skipped} == {
        (run, "interrupted") for run in runs[1:]
    }


def test_a_process_is_watched_until_it_ends(tmp_path: pathlib.Path):
    """It ends when what is done meanwhile lets it, and with the one who watches."""
    sign = tmp_path / "sign"
    waits = "import pathlib, sys\nwhile not pathlib.Path(sys.argv[1]).exists(): pass\nsys.exit(7)"
    command = [sys.executable, "-c", waits, str(sign)]
    assert table.watched(command, sign.touch, 0.01) == 7
    sign.unlink()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.watched(command, stop, 0.01)


def test_a_line_holds_loss_gradient_and_both():
    ours = table.LINES[0]
    measured = Report(
        rows=(
            row(ours.run("fwd", 0.1), p50_ms=15.0, extra_mb=0.5, framework="jax 1.2"),
            row(
                ours.run("fwdbwd", 0.1),
                p50_ms=25.5,
                extra_mb=1234.5,
                matmul_ratio=1.82,
                hidden_error=0.0123,
                head_error=0.004,
                framework="jax 1.2",
            ),
            row(Run("torch-eager", "fwd"), p50_ms=33.0, extra_mb=None, framework="torch 3.4"),
        ),
        skipped=(
            Skipped(Run("liger", "fwd", Settings(0.1)), "absent"),
            Skipped(Run("liger", "fwdbwd", Settings(0.1)), "absent"),
            Skipped(Run("jax-cce", "fwd"), "absent"),
        ),
    )
    lines = table.markdown(measured).splitlines()
    assert "| **lsce** | 0.5 | 15 | 10.5 | 1,234.5 | 25.5 | 1.82 | 0.012, 0.004 |" in lines
    assert "| torch, eager | – | 33 | – | – | – | – | –, – |" in lines
    assert "- absent: Liger, its Triton kernels; jax-cce" in lines
    assert "jax 1.2, torch 3.4" in lines[0]
    # The smoothed table comes first and holds no unsmoothed row.
    smoothed, plain = (lines.index(f"**β = {beta}**") for beta in ("0.1", "0"))
    assert smoothed < lines.index("| torch, eager | – | 33 | – | – | – | – | –, – |")
    assert smoothed < plain


def test_nothing_measured_is_said_and_fails(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "empty.json"
    report.write(Report(skipped=(Skipped(Run("liger", "fwd"), "absent"),)), path)
    assert table.main(["--from", str(path)]) == 1
    assert "Nothing was measured." in capsys.readouterr().out


def test_a_wrong_name_is_refused(capsys: pytest.CaptureFixture[str]):
    assert table.main(["--case", "huge"]) == 2
    assert "must be DxV or one of gemma2-2b" in capsys.readouterr().err
    assert table.main(["--from", "absent.json"]) == 2
    assert "absent.json" in capsys.readouterr().err
    assert table.main(["--lines", "ours"]) == 2
    said = capsys.readouterr().err
    assert "--lines: no title contains 'ours'; the titles are **lsce**, " in said
    assert table.main(["--frameworks", "jax", "--lines", "QuACK", "Liger"]) == 2
    assert "--frameworks jax runs none of --lines QuACK Liger" in capsys.readouterr().err


def test_rows_of_several_cases_make_no_table(capsys: pytest.CaptureFixture[str]):
    results = ROOT / "benchmarks" / "results"
    assert table.main(["--from", str(results / "h100-everywhere.json")]) == 2
    said = capsys.readouterr()
    assert "rows of one case are wanted, not of gemma2-2b at N = 2,048, bfloat16" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("command", "file"), [(table.main, "table-flat"), (everywhere.main, "everywhere")]
)
def test_rows_of_several_devices_make_no_table(
    command, file: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    measured = report.read(ROOT / "benchmarks" / "results" / f"h100-{file}.json")
    other = dataclasses.replace(measured.rows[0], device="NVIDIA H200")
    report.write(report.Report((*measured.rows, other)), tmp_path / "rows.json")
    assert command(["--from", str(tmp_path / "rows.json")]) == 2
    said = capsys.readouterr()
    assert "rows of one device are wanted, not of NVIDIA H100 80GB HBM3; NVIDIA H200" in said.err
    assert said.out == ""
