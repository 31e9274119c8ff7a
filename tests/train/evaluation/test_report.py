"""The table, eval.json and the picture of an evaluation."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from train.evaluation import report
from train.evaluation.scoring import BINS, REPORTED, Evaluation, Scores

FLAGS = {"out": Path("runs/one"), "data": (Path("a.jsonl"),), "label_smoothing": 0.1}


def scores(n: int, seed: int) -> Scores:
    random = np.random.default_rng(seed)
    confidence = random.uniform(0.3, 1, n).astype(np.float32)
    correct = random.random(n) < confidence - 0.1
    return Scores.of(np.log(confidence), confidence, correct, (1 - confidence) ** 2)


EVALUATION = Evaluation(
    tokens=scores(900, 0),
    choices={"sum": scores(120, 1), "per_token": scores(120, 2)},
    chance=0.25,
    left_out=2,
)
NOTHING = Evaluation(tokens=None, choices={}, chance=None, left_out=0)


def printed(evaluation: Evaluation) -> str:
    text = io.StringIO()
    report.print_table(evaluation, Console(file=text, width=80))
    return text.getvalue()


def test_the_table_shows_every_score():
    text = printed(EVALUATION)
    columns = (EVALUATION.tokens, EVALUATION.choices["per_token"], EVALUATION.choices["sum"])
    for label, (field, form) in report.ROWS.items():
        row = next(line for line in text.splitlines() if line.startswith(f" {label}"))
        assert row.split()[-3:] == [form.format(getattr(s, field)) for s in columns]
    assert "guessing is right 25% of the time" in text
    assert "2 questions are left out, too long" in text


def test_a_table_of_nothing_says_so():
    assert printed(NOTHING) == "Nothing was held out, so there is nothing to evaluate.\n"


def test_eval_json_keeps_its_keys():
    found = report.as_json(EVALUATION, FLAGS, step=300)
    assert list(found) == ["format", "step", "tokens", "choices", "config", "versions", "device"]
    assert list(found["choices"]) == ["reported", "chance", "left_out", "per_token", "sum"]
    assert list(found["tokens"]) == [
        "n", "nll", "accuracy", "ece", "rms", "brier", "mean_confidence", "bins",
    ]  # fmt: skip
    assert found["config"] == {"out": "runs/one", "data": ["a.jsonl"], "label_smoothing": 0.1}
    assert found["choices"]["reported"] == REPORTED
    assert {"python", "lsce", "jax", "flax"} <= found["versions"].keys()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_ece_and_accuracy_can_be_had_from_the_bins():
    found = report.as_json(EVALUATION, FLAGS, step=300)["tokens"]
    bins = found["bins"]
    assert len(bins) == BINS
    assert sum(b["count"] for b in bins) == found["n"] == 900
    assert any(b["count"] == 0 for b in bins)
    ece = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / 900
    assert found["ece"] == pytest.approx(ece, rel=1e-5)
    accuracy = sum(b["count"] * b["accuracy"] for b in bins) / 900
    assert found["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    for b in bins:
        if b["count"]:
            assert b["low"] <= b["confidence"] <= b["high"] + 1e-6


@pytest.mark.parametrize(("evaluation", "panels"), [(EVALUATION, 2), (NOTHING, 1)])
def test_the_folder_has_the_picture_and_the_numbers(tmp_path, evaluation, panels):
    out = tmp_path / "run"
    report.write(out, evaluation, FLAGS, step=7)
    assert {path.name for path in out.iterdir()} == {"eval.json", "reliability.png"}
    found = json.loads((out / "eval.json").read_text())
    assert found["step"] == 7
    assert (found["tokens"] is None) == (evaluation.tokens is None)
    height, width, _ = matplotlib.image.imread(out / "reliability.png").shape
    assert width > 700 * panels
    assert height > 800


def test_the_picture_comes_before_the_numbers(tmp_path, monkeypatch):
    """A folder with eval.json is done: a crash before that must not leave one."""

    def crash(_evaluation):
        raise RuntimeError("no picture")

    monkeypatch.setattr(report, "reliability_figure", crash)
    with pytest.raises(RuntimeError, match="no picture"):
        report.write(tmp_path, EVALUATION, FLAGS, step=7)
    assert list(tmp_path.iterdir()) == []


def test_the_panels_are_the_tokens_and_the_reported_scoring():
    figure = report.reliability_figure(EVALUATION)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    reported = EVALUATION.choices[REPORTED]
    assert any("n 900" in text for text in texts)
    assert any(f"accuracy {reported.accuracy:.4f}" in text and "n 120" in text for text in texts)
