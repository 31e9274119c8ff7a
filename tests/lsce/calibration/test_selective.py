"""AUROC, AURC and the risk–coverage curve against pairs counted and orders averaged in float64."""

import jax
import numpy as np
import pytest
from scipy import stats

from lsce import calibration


def samples(n=300, seed=0, levels=None):
    """Confidences that are surer where right; with `levels`, few different ones."""
    r = np.random.default_rng(seed)
    confidence = r.random(n)
    if levels:
        confidence = np.round(confidence * levels) / levels
    return confidence.astype(np.float32), r.random(n) < 0.2 + 0.6 * confidence


def direct_curve(confidence, correct):
    """The risk at every coverage, averaged over orders of equal confidences one by one."""
    risks, taken, errors = [], 0, 0.0
    for level in np.unique(confidence)[::-1]:
        group = ~correct[confidence == level]
        risks += [(errors + j * group.mean()) / (taken + j) for j in range(1, len(group) + 1)]
        taken, errors = taken + len(group), errors + group.sum()
    return np.array(risks)


@pytest.mark.parametrize("levels", [None, 7, 1])
def test_against_pairs_and_orders(levels):
    confidence, correct = samples(levels=levels)
    right, wrong = confidence[correct], confidence[~correct]
    pairs = stats.mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong))
    assert float(calibration.auroc(confidence, correct)) == pytest.approx(pairs, abs=1e-6)
    coverage, risk = calibration.risk_coverage(confidence, correct)
    expected = direct_curve(confidence, correct)
    np.testing.assert_allclose(risk, expected, rtol=1e-5)
    np.testing.assert_allclose(coverage, np.arange(1, 301) / 300, rtol=1e-6)
    assert float(calibration.aurc(confidence, correct)) == pytest.approx(expected.mean(), rel=1e-5)
    assert 0.6 < pairs < 0.9


def test_the_order_of_equal_confidences_is_averaged_over():
    """Against the plain curves of many shuffles, which know nothing of ties."""
    confidence, correct = samples(levels=3)
    r, curves = np.random.default_rng(1), []
    for _ in range(2000):
        shuffled = r.permutation(300)
        order = shuffled[np.argsort(-confidence[shuffled], kind="stable")]
        curves.append(np.cumsum(~correct[order]) / np.arange(1, 301))
    risk = calibration.risk_coverage(confidence, correct).risk
    np.testing.assert_allclose(risk, np.mean(curves, axis=0), atol=0.05)
    assert np.std(curves, axis=0).max() > 0.1


def test_nothing_depends_on_the_order_nor_on_a_monotone_change():
    confidence, correct = samples(levels=9)
    order = np.random.default_rng(2).permutation(300)
    for metric in (calibration.auroc, calibration.aurc):
        value = float(metric(confidence, correct))
        assert float(metric(confidence[order], correct[order])) == value
        assert float(metric(confidence**3, correct)) == value
        assert float(jax.jit(metric)(confidence, correct)) == pytest.approx(value, rel=1e-6)


def test_the_best_and_the_worst_order():
    confidence = np.linspace(0, 1, 300, dtype=np.float32)
    right = np.arange(300) >= 120
    assert float(calibration.auroc(confidence, right)) == 1
    assert float(calibration.auroc(confidence, ~right)) == 0
    assert float(calibration.aurc(confidence, right)) < float(calibration.aurc(confidence, ~right))
    assert float(calibration.auroc(np.full_like(confidence, 0.3), right)) == 0.5
    assert np.isnan(calibration.auroc(confidence, np.ones(300)))
    assert np.isnan(calibration.auroc(confidence, np.zeros(300)))
    assert float(calibration.aurc(confidence, np.ones(300))) == 0
    assert float(calibration.aurc(confidence, np.zeros(300))) == 1


@pytest.mark.parametrize("metric", [calibration.auroc, calibration.aurc])
def test_what_is_invalid_raises_outside_jit_and_is_nan_inside(metric):
    confidence, correct = samples()
    bad = np.where(np.arange(300) == 17, np.nan, confidence).astype(np.float32)
    with pytest.raises(ValueError, match=r"confidence must be a probability .* at \[17\]"):
        metric(bad, correct)
    assert np.isnan(jax.jit(metric)(bad, correct))
    labels = np.where(np.arange(300) == 3, 2, correct)
    with pytest.raises(ValueError, match=r"correct must be 0 or 1, got 2 at \[3\]"):
        metric(confidence, labels)
    assert np.isnan(jax.jit(metric)(confidence, labels))
