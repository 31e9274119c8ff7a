"""Every measure of an evaluation against `lsce.calibration` and float64; the file of results."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from lsce import calibration
from train.evaluation import measures, page_entries, results, table, token_level
from train.evaluation.scoring import TokenScores

pytestmark = pytest.mark.usefixtures("quickly_compiled")

N = 60


@pytest.fixture(scope="module")
def choices():
    """Log-probabilities of up to four choices, the last one not always there, and labels."""
    r = np.random.default_rng(0)
    scores = 2 * r.standard_normal((N, 4))
    scores[::3, 3] = -np.inf
    log_probs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    right = np.cumsum(np.exp(log_probs / 2), 1)
    return log_probs, (r.random((N, 1)) * right[:, -1:] > right[:, :-1]).sum(1)


@pytest.fixture(scope="module")
def score_once(choices):
    """In a test: `quickly_compiled` begins after what is of the module."""
    subjects = ["art" if n % 4 else "zoology" for n in range(N)]
    return functools.cache(lambda: measures.score(*choices, subjects, resamples=0, seed=0))


@pytest.fixture
def scored(quickly_compiled, score_once):
    return score_once()


@pytest.fixture
def means_alone(monkeypatch):
    """Without the errors: their resamples take seconds to compile."""
    monkeypatch.setattr(measures, "GROUPS", measures.GROUPS[:1])


def test_values_are_those_of_the_library(choices, scored):
    log_probs, labels = choices
    probs = np.exp(log_probs).astype(np.float32)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    found = {name: measure.value for name, measure in scored.measures.items()}
    assert list(found) == [name for name in measures.NAMES if name != "outside"]
    expected = {
        "accuracy": correct.mean(),
        "gap": confidence.mean() - correct.mean(),
        "ece": calibration.expected_calibration_error(confidence, correct),
        "hendrycks_rms": calibration.hendrycks_rms(confidence, correct),
        "sce": calibration.static_calibration_error(probs, labels) / (11 / 12),
        "ace": calibration.adaptive_calibration_error(probs, labels) / (11 / 12),
        "brier": np.square(probs - np.eye(4)[labels]).sum(1).mean(),
        "nll": -log_probs[np.arange(N), labels].mean(),
        "auroc": calibration.auroc(confidence, correct),
        "aurc": calibration.aurc(confidence, correct),
        "smooth_ece": calibration.smooth_calibration_error(confidence, correct),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4), name
    parts = [found[f"brier_{part}"] for part in ("reliability", "uncertainty", "within_bins")]
    assert sum(parts) - found["brier_resolution"] == pytest.approx(found["brier"], abs=1e-5)


def test_a_choice_that_few_questions_have_is_no_class_of_all(choices):
    """SCE is Σ over choices k of n_k · ECE_k / Σ n_k, each ECE_k of the n_k questions that have k:
    one question of five would else make it a fifth less."""
    log_probs, labels = choices
    wide = np.pad(log_probs, ((0, 0), (0, 1)), constant_values=-np.inf)
    four, five = (measures.errors(lp, labels) for lp in (log_probs, wide))
    for name in ("sce", "ace"):
        assert float(five[name]) == pytest.approx(float(four[name]), rel=1e-6)
    total = 0.0
    for k in range(4):
        there = np.isfinite(log_probs[:, k])
        p, right = np.exp(log_probs[there, k]).astype(np.float32), labels[there] == k
        total += there.sum() * float(calibration.expected_calibration_error(p, right, bins=30))
    assert float(four["sce"]) == pytest.approx(total / np.isfinite(log_probs).sum(), rel=1e-5)


def test_subjects_bins_and_the_curve_add_up_to_the_whole(scored):
    accuracy = scored.measures["accuracy"].value
    for parts in (
        [(subject.n, subject.accuracy) for subject in scored.subjects],
        [(b.count, b.accuracy) for b in scored.bins],
    ):
        assert sum(n for n, _ in parts) == N
        assert sum(n * a for n, a in parts) / N == pytest.approx(accuracy, abs=1e-6)
    assert [subject.name for subject in scored.subjects] == ["art", "zoology"]
    assert scored.risk_coverage.coverage[-1] == 1
    assert scored.risk_coverage.risk[-1] == pytest.approx(1 - accuracy, abs=1e-6)


def test_what_is_left_outside_the_choices_is_reported(choices):
    log_probs, labels = choices
    part = measures.score(log_probs + np.log(0.25), labels, resamples=0, seed=0)
    assert part.measures["outside"] == results.Measure(pytest.approx(0.75, abs=1e-5))
    assert part.subjects == []


def test_intervals_hold_the_values_and_paired_ones_are_narrower(choices, scored, means_alone):
    log_probs, labels = choices
    measures._drawn.cache_clear()
    alone = measures.score(log_probs, labels, resamples=20, seed=0).measures
    for name in ("accuracy", "nll", "auroc", "aurc", "gap", "confidence"):
        assert alone[name].value == scored.measures[name].value
        assert alone[name].low < alone[name].value < alone[name].high
    near = log_probs / 1.1
    near -= np.logaddexp.reduce(near, axis=1, keepdims=True)
    apart = measures.difference(near, log_probs, labels, resamples=20, seed=0)
    nll = -near[np.arange(N), labels].mean() - alone["nll"].value
    assert apart["nll"].value == pytest.approx(nll, abs=1e-5)
    assert apart["nll"].low < apart["nll"].value < apart["nll"].high
    assert apart["nll"].high - apart["nll"].low < (alone["nll"].high - alone["nll"].low) / 3
    assert apart["accuracy"] == results.Measure(0, 0, 0)
    assert measures._drawn.cache_info().misses == 2  # a model's resamples are drawn once


@pytest.mark.parametrize(
    ("name", "apart", "ends"),
    [
        ("ece", False, (0, 1)),
        ("ece", True, (-1, 1)),
        ("gap", False, (-1, 1)),
        ("brier_reliability", False, (0, 2)),
        ("nll", False, (0, 9)),
        ("nll", True, (-9, 9)),
    ],
)
def test_an_interval_ends_where_the_measure_can_be(name, apart, ends):
    found = measures.within(name, results.Measure(0.1, -9, 9), apart=apart)
    assert found == results.Measure(0.1, *ends)
    inside = results.Measure(0.1, 0.05, 0.15)
    assert measures.within(name, inside, apart=apart) == inside
    assert measures.within(name, results.Measure(0.1), apart=apart) == results.Measure(0.1)


def test_what_is_mostly_wrong_and_sure_has_no_interval_above_1(monkeypatch):
    """Twice the value less the low end of the resamples would be."""
    confidence, correct = np.full(3, 0.99, np.float32), np.array([False, False, True])
    log_prob = np.where(correct, np.log(0.99), np.log(0.01))
    scores = TokenScores(log_prob, confidence, correct, np.zeros(3))
    tokens = token_level.measured(scores, np.arange(3), resamples=200, seed=0).measures
    assert (tokens["ece"].high, tokens["mce"].high) == (1.0, 1.0)
    assert page_entries.ece_from_bins(measures.bins(confidence, correct)).high == 1.0
    monkeypatch.setattr(
        measures,
        "_intervals",
        lambda *_: {"ece": results.Measure(0.6, -1, 3), "outside": results.Measure(0)},
    )
    log_probs, labels = np.log([[0.01, 0.99]] * 3), np.zeros(3, int)
    monkeypatch.setattr(measures, "GROUPS", measures.GROUPS[:1])
    found = measures.score(log_probs, labels, resamples=9, seed=0)
    assert found.measures == {"ece": results.Measure(0.6, 0, 1)}


@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_has_no_value_is_said_to_have_none(value):
    """NaN in the process that found it, null in its file."""
    assert table.text("auroc", results.Measure(value, value, value)) == "undefined"


def test_a_result_is_read_as_it_was_written(scored, tmp_path):
    task = results.TaskResult(
        task="arc-easy",
        data="questions.jsonl",
        data_sha256="0" * 64,
        questions=N,
        available=N,
        left_out=0,
        prompt="harness",
        answer="text",
        shots=0,
        chance=0.25,
        reported="sum",
        scorings={"sum": scored},
        items="arc-easy.items.jsonl",
        against=results.Against("other", "r.json", N, {"sum": {"nll": results.Measure(0.1)}}),
    )
    temperature = results.Temperature(1.5, "val", 9, scored.measures, scored.bins)
    task.scorings["per_token"] = dataclasses.replace(scored, temperature=temperature)
    written = results.Result(
        model="m",
        weights="1f",
        command="python -m train.evaluate",
        seed=0,
        versions={"jax": None},
        device="cpu",
        tasks={"arc-easy": task},
    )
    results.write(tmp_path / results.RESULT, written)
    assert results.read(tmp_path) == written
    found = json.loads((tmp_path / results.RESULT).read_text())
    later = tmp_path / "later.json"
    later.write_text(json.dumps(found | {"of_a_later_version": 1}))
    assert results.read(later) == written
    later.write_text(json.dumps(found | {"version": 2}))
    with pytest.raises(ValueError, match=r"later\.json is no result .* of version 2"):
        results.read(later)
    later.write_text("{}")
    with pytest.raises(ValueError, match=r"later\.json is no result"):
        results.read(later)
    with pytest.raises(ValueError, match="there is no result"):
        results.read(tmp_path / "none.json")
    undefined = dataclasses.replace(scored, measures={"auroc": results.Measure(float("nan"))})
    results.write(later, dataclasses.replace(written, tasks={}, tokens=undefined))
    assert results.read(later).tokens.measures["auroc"].value is None
