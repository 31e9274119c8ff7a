"""A row a run: right, self-explaining, or skipped with a reason."""

import dataclasses
import functools
import subprocess

import jax
import numpy as np
import pytest
from paths import ROOT

from benchmarks.frameworks.jax import JaxFramework
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.implementations.settings import Run, Settings
from benchmarks.inputs import random
from benchmarks.inputs.arrays import Inputs
from benchmarks.inputs.cases import Case
from benchmarks.measure import errors, runner
from benchmarks.measure.report import Report

SMALL = Case("small", 33, 24, 201)


@pytest.fixture
def small() -> Inputs:
    return random.make("peaked", SMALL, "float32")


def measured(data: Inputs, *runs: Run) -> Report:
    framework = JaxFramework(data)
    return runner.measure_runs(framework, data, "small", runs, seconds=0.01, commit="abc")


def test_all_implementations_compute_the_same_loss_and_gradients(small: Inputs):
    names = ("auto", "chunked", "reference", "naive")
    runs = [Run(name, "fwdbwd", Settings(label_smoothing=0.1, softcap=5.0)) for name in names]
    runs.append(Run("naive", "fwd"))
    runs.append(Run("naive-integer", "fwd"))
    reference = functools.partial(errors.exact_gradients, small)
    measured = runner.measure_runs(
        JaxFramework(small),
        small,
        "small",
        runs,
        seconds=0.01,
        commit="abc",
        reference=lambda settings: reference(settings.label_smoothing, settings.softcap),
    )
    assert not measured.skipped
    *smoothed, one_hot, integer = measured.rows
    z = small.hidden.astype(np.float64) @ small.head.astype(np.float64).T
    capped = 5 * np.tanh(z / 5)
    lse = np.log(np.exp(capped).sum(1))
    target = capped[np.arange(SMALL.n), small.labels]
    expected = np.mean(lse - 0.9 * target - 0.1 * capped.mean(1))
    for row in smoothed:
        assert row.loss == pytest.approx(expected, rel=1e-5)
        assert row.hidden_error is not None
        assert row.head_error is not None
        assert max(row.hidden_error, row.head_error) < 1e-5
        assert row.output_mb == pytest.approx(4 * (24 * (33 + 201) + 1) / 2**20, rel=1e-2)
    assert one_hot.loss == pytest.approx(integer.loss, rel=1e-6)
    assert one_hot.hidden_error is None


def test_a_row_explains_itself(small: Inputs):
    run = Run("auto", "fwdbwd", Settings(label_smoothing=0.1, stats=True, vocab_order=True))
    row = measured(small, run).rows[0]
    assert row.backend in IMPLEMENTATIONS
    assert row.backend != "auto"
    assert (row.case, row.n, row.d, row.v, row.dtype) == ("small", 33, 24, 201, "float32")
    assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
    assert row.tflops == pytest.approx(3 * 2 * 33 * 24 * 201 / row.p50_ms / 1e9)
    assert row.matmul_ratio == pytest.approx(row.p50_ms / row.matmul_ms)
    assert row.matmul_share == pytest.approx(3 / row.matmul_ratio)
    assert row.extra_mb == pytest.approx((row.temporary_mb or 0) + (row.output_mb or 0))
    assert jax.__version__ in row.framework
    assert row.device
    assert row.commit == "abc"


def test_what_cannot_run_is_skipped_with_a_reason_and_the_rest_goes_on(small: Inputs):
    smoothed = Settings(label_smoothing=0.1)
    outcome = measured(
        small,
        Run("naive-integer", "fwd", smoothed),
        Run("jax-cce", "fwd", smoothed),
        Run("naive", "fwd", Settings(stats=True)),
        Run("auto", "fwd", Settings(gradient_filter="most")),
        Run("naive", "fwd", smoothed),
    )
    assert [row.run.implementation for row in outcome.rows] == ["naive"]
    reasons = [skipped.reason for skipped in outcome.skipped]
    assert reasons[:3] == ["has no smoothing", "has no smoothing", "has no statistics"]
    assert "most" in reasons[3]


def test_what_a_backend_has_no_use_for_is_not_measured_again(small: Inputs):
    filters = ("auto", None, "fused", "hidden", "fp8", 1e-3)
    runs = [Run("auto", "fwd", Settings(gradient_filter=filter)) for filter in filters]
    ordered = Run("auto", "fwd", Settings(vocab_order=True))
    capped = Run("auto", "fwd", Settings(softcap=5.0))
    by_name = Run("chunked", "fwd")
    naive = [Run("naive", "fwd", Settings(gradient_filter=filter)) for filter in ("auto", None)]
    outcome = measured(small, *runs, ordered, capped, by_name, *naive)
    assert [row.run for row in outcome.rows] == [runs[0], capped, by_name, naive[0]]
    assert [skipped.run for skipped in outcome.skipped] == [*runs[1:], ordered, naive[1]]
    assert {skipped.reason for skipped in outcome.skipped} == {
        "chunked runs the same whatever these options are",
        "naive runs the same whatever these options are",
    }
    other = IMPLEMENTATIONS["cut-cross-entropy"]
    exact = Settings(gradient_filter=None)
    assert other.heeded(exact, other.name) == exact


def test_an_absent_peer_is_skipped_by_name(small: Inputs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "jax_cce", None)
    (skipped,) = measured(small, Run("jax-cce", "fwd")).skipped
    assert "jax_cce" in skipped.reason
    assert skipped.reason.endswith("; pip install jax-cce")


def test_a_peer_from_a_checkout_has_a_row_all_the_same(
    small: Inputs, monkeypatch: pytest.MonkeyPatch
):
    odd = dataclasses.replace(IMPLEMENTATIONS["naive"], packages=("no-distribution", "jax"))
    monkeypatch.setitem(IMPLEMENTATIONS, "naive", odd)
    first, second = measured(small, Run("naive", "fwd"), Run("reference", "fwd")).rows
    jax_s = f"jax {jax.__version__}"
    assert first.framework == f"{jax_s}, no-distribution of unknown version, {jax_s}"
    assert "unknown" not in second.framework


def test_a_row_survives_a_reference_that_does_not_fit(small: Inputs):
    def too_large(settings: Settings):
        raise MemoryError("out of memory")

    said = []
    outcome = runner.measure_runs(
        JaxFramework(small),
        small,
        "small",
        [Run("naive", "fwdbwd")],
        seconds=0.01,
        commit="abc",
        reference=too_large,
        announce=said.append,
    )
    assert outcome.rows[0].hidden_error is None
    assert said[-1] == "no errors of naive: MemoryError: out of memory"


def test_an_unknown_implementation_is_refused_before_anything_runs(small: Inputs):
    with pytest.raises(ValueError, match=r"'fast'; must be one of auto, .*naive"):
        measured(small, Run("naive", "fwd"), Run("fast", "fwd"))


def test_the_commit_is_git_s():
    root = ROOT
    git = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    expected = git.stdout.strip() if git.returncode == 0 else "unknown"
    assert runner.current_commit().removesuffix("-dirty") == expected
