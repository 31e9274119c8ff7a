"""Rows survive their file, and are shown."""

import io
import pathlib

import pytest
from rich.console import Console

from benchmarks.frameworks.jax import JaxFramework
from benchmarks.implementations.settings import Run, Settings
from benchmarks.inputs import random
from benchmarks.inputs.cases import Case
from benchmarks.measure import report, runner


@pytest.fixture(scope="module")
def outcome() -> report.Report:
    """A row of exact gradients, and a run that was skipped."""
    data = random.make("peaked", Case("small", 33, 24, 201), "float32")
    settings = Settings(label_smoothing=0.1, gradient_filter=None)
    runs = [Run("auto", "fwd", settings), Run("naive-integer", "fwd", settings)]
    measured = runner.measure_runs(
        JaxFramework(data), data, "small", runs, seconds=0.01, commit="abc"
    )
    assert len(measured.rows) == len(measured.skipped) == 1
    return measured


def test_a_report_survives_its_file(tmp_path: pathlib.Path, outcome: report.Report):
    path = tmp_path / "folder" / "report.json"
    report.write(outcome, path)
    assert report.read(path) == outcome
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a benchmark report"):
        report.read(path)


def test_the_table_shows_rows_and_reasons(outcome: report.Report):
    out = io.StringIO()
    report.show(outcome, Console(file=out))
    text = out.getvalue()
    assert "N, D, V = 33, 24, 201" in text
    assert f"auto → {outcome.rows[0].backend}" in text
    assert "β=0.1 filter=exact" in text
    assert "skipped naive-integer β=0.1 filter=exact: has no smoothing" in text
