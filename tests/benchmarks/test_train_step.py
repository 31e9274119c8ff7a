"""The command that measures whole steps: its table, its file, its refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import train_step
from benchmarks.steps.row import Measured, StepRow, markdown
from benchmarks.steps.variant import Variant

FOUND = Measured(49.0, 50.0, 51.0, 10.0, 9.0, 1.6, 12.0, 30.0, "packed", "NVIDIA H100", "jax 1")
ROW = StepRow("nano", Variant(rows=16), 1000, 8.0, 1e9, FOUND, None, "abc", "2026")


def test_tokens_a_second_and_the_share_of_the_device():
    assert ROW.tokens_per_s == pytest.approx(320_000)
    assert ROW.mfu == pytest.approx(320_000 * 1e9 / 989e12)
    two = dataclasses.replace(ROW, variant=Variant(rows=16, mesh="fsdp=2"))
    assert two.mfu == pytest.approx(320_000 * 1e9 / (2 * 989e12))
    cpu = dataclasses.replace(ROW, measured=dataclasses.replace(FOUND, device="CPU"))
    assert cpu.mfu is None
    failed = dataclasses.replace(ROW, measured=None, error="no memory")
    assert "| 320,000 | 32.4% |" in markdown([ROW, failed])
    assert "no memory" in markdown([ROW, failed])


def test_a_row_is_read_as_it_was_written():
    for row in (ROW, dataclasses.replace(ROW, measured=None, error="no memory")):
        assert train_step.from_json(json.loads(json.dumps(dataclasses.asdict(row)))) == row


def test_pytorch_has_the_device_to_itself(monkeypatch, capsys):
    asked = []

    def rows(model, variants, framework, options):
        asked.append((model, framework))
        return [ROW]

    monkeypatch.setattr(train_step, "_rows", rows)
    assert train_step.main(["--model", "nano", "--variant", "", "torch,beta=0"]) == 0
    assert asked == [("nano", "torch"), ("nano", "jax")]
    assert capsys.readouterr().out.count("| nano |") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "gpt"],
        ["--variant", "rows=0"],
        ["--length", "1"],
        ["--checkpoint", "smollm2-135m"],
        ["--checkpoint", "nano", "--data", "pyproject.toml"],
    ],
)
def test_a_mistake_is_a_line_on_stderr(arguments, capsys):
    assert train_step.main(arguments) == 2
    assert capsys.readouterr().err.startswith("benchmarks.train_step: ")


def test_a_row_says_what_its_devices_lack(capsys):
    assert train_step.main(["--model", "nano", "--length", "16", "--variant", "mesh=data=64"]) == 1
    assert "| ValueError: --mesh data=64,fsdp=1 has 64 devices, and this" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trainers_step_is_measured_on_any_device(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--model", "nano", "--length", "16", "--seconds", "0.01", "--json", str(path)]
    arguments += ["--variant", "rows=1,layers=1", "rows=1,layers=1,loss=naive", "loss=nobody"]
    assert train_step.main(arguments) == 0
    ours, naive, failed = map(train_step.from_json, json.loads(path.read_text()))
    assert ours.measured is not None
    assert naive.measured is not None
    # optax smooths the one ignored label of 16, too: β · ln V / 15.
    assert ours.measured.first_loss == pytest.approx(naive.measured.first_loss, abs=0.1)
    assert ours.measured.first_loss != naive.measured.first_loss  # another program, not its trace
    assert 0 < ours.measured.last_loss < ours.measured.first_loss
    assert failed.measured is None
    assert "nobody" in str(failed.error)
