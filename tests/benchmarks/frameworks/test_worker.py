"""A framework's process gets its plan, and one that is absent skips it."""

import importlib.util
import pathlib

import pytest

from benchmarks import table
from benchmarks.frameworks import worker
from benchmarks.inputs import arrays, cases, random
from benchmarks.measure import report

TORCH = importlib.util.find_spec("torch") is not None


def test_the_plan_reaches_the_other_process(tmp_path: pathlib.Path):
    plan = worker.Plan("tiny", tuple(table.runs_of("torch")), 0.5, "abc")
    worker.write_plan(plan, "torch", tmp_path)
    assert worker.read_plan("torch", tmp_path) == plan


@pytest.mark.skipif(TORCH, reason="torch is installed, so nothing is absent")
def test_an_absent_framework_skips_its_lines(tmp_path: pathlib.Path):
    arrays.save(random.make("flat", cases.CASES["tiny"], "bfloat16"), tmp_path / "inputs.npz")
    runs = tuple(table.runs_of("torch"))
    worker.write_plan(worker.Plan("tiny", runs, 0.01, "abc"), "torch", tmp_path)
    worker.work("torch", tmp_path)
    measured = report.read(worker.report_path("torch", tmp_path))
    assert [skipped.run for skipped in measured.skipped] == list(runs)
    assert {s.reason for s in measured.skipped} == {
        "ModuleNotFoundError: No module named 'torch'; pip install torch"
    }
