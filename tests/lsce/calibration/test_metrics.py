"""The calibration metrics against independent libraries' values, float64 numpy, and bad input."""

import doctest
import functools
import importlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsce import calibration
from lsce.calibration.bins import sortable, sums_by_bin

SAMPLE_METRICS = {
    "ece": calibration.expected_calibration_error,
    "ece_equal_mass": functools.partial(calibration.expected_calibration_error, equal_mass=True),
    "mce": calibration.maximum_calibration_error,
    "rms": calibration.rms_calibration_error,
    "hendrycks": calibration.hendrycks_rms,
    "gap": calibration.confidence_gap,
    "l2": calibration.debiased_l2,
    "smooth": calibration.smooth_calibration_error,
    "brier": calibration.top_label_brier_score,
}
CLASS_METRICS = {
    "brier": calibration.brier_score,
    "nll": calibration.negative_log_likelihood,
    "sce": calibration.static_calibration_error,
    "classwise": calibration.classwise_ece,
    "ace": calibration.adaptive_calibration_error,
    "tace": calibration.thresholded_adaptive_calibration_error,
    "decomposition": lambda p, y: calibration.brier_decomposition(p, y).reliability,
    "uncertainty": lambda p, y: calibration.brier_decomposition(p, y).uncertainty,
}


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def oracle():
    """2,000 over-confident predictions over 4 classes whose metrics other libraries agree on."""
    r = np.random.default_rng(0)
    n, k = 2000, 4
    logits, u = 2 * r.standard_normal((n, k)), r.random(n)
    labels = (u[:, None] > np.cumsum(softmax(logits / 2), 1)[:, :-1]).sum(1)
    assert labels[:8].tolist() == [0, 3, 2, 3, 2, 3, 0, 3]
    assert labels.sum() == 3048
    probs = softmax(logits)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    assert confidence.sum() == pytest.approx(1383.62091031, abs=1e-8)
    assert correct.mean() == 0.5335
    return {
        "logits": logits,
        "probs": probs,
        "labels": labels,
        "confidence": confidence,
        "correct": correct,
    }


c = calibration
ORACLE_OF_SAMPLES = [
    (functools.partial(c.expected_calibration_error, bins=10), 0.15831046),
    (functools.partial(c.expected_calibration_error, bins=15), 0.16016107),
    (functools.partial(c.expected_calibration_error, bins=30), 0.16290813),
    (functools.partial(c.expected_calibration_error, equal_mass=True), 0.16161724),
    (functools.partial(c.maximum_calibration_error, bins=10), 0.27273303),
    (c.maximum_calibration_error, 0.28517470),
    (lambda p, a: c.CalibrationState.create(10).update(p, a).compute().rms, 0.17603463),
    (lambda p, a: c.CalibrationState.create(15).update(p, a).compute().rms, 0.17767582),
    (lambda p, a: c.CalibrationState.create(30).update(p, a).compute().rms, 0.18262732),
    (lambda p, a: c.CalibrationState.create(15).update(p, a).compute().ece, 0.16016107),
    (lambda p, a: c.CalibrationState.create(15).update(p, a).compute().mce, 0.28517470),
    (c.rms_calibration_error, 0.17973251),
    (c.hendrycks_rms, 0.20047297),
    (c.debiased_l2, 0.17646340),
    (functools.partial(c.debiased_l2, debias=False), 0.18136730),
    (c.smooth_calibration_error, 0.15852978),
    (c.top_label_brier_score, 0.26518661),
    (c.confidence_gap, 1383.62091031 / 2000 - 0.5335),
]
ORACLE_OF_CLASSES = [
    (c.static_calibration_error, 0.08614291),
    (c.adaptive_calibration_error, 0.08484955),
    (c.thresholded_adaptive_calibration_error, 0.09255670),
    (c.classwise_ece, 0.08281722),
    (c.brier_score, 0.63871754),
    (c.negative_log_likelihood, 1.21978645),
]


@pytest.mark.parametrize(("metric", "expected"), ORACLE_OF_SAMPLES)
def test_sample_metrics_agree_with_independent_libraries(oracle, metric, expected):
    value = metric(oracle["confidence"], oracle["correct"])
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("metric", "expected"), ORACLE_OF_CLASSES)
def test_class_metrics_agree_with_independent_libraries(oracle, metric, expected):
    value = metric(oracle["probs"], oracle["labels"])
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("metric", "expected"), ORACLE_OF_SAMPLES[1::3])
def test_float64_is_kept_in_x64_mode(oracle, metric, expected):
    with jax.enable_x64():
        value = metric(oracle["confidence"], oracle["correct"])
        assert value.dtype == jnp.float64
        # CalibrationState rounds confidences to 2⁻²⁴; the rest is exact to the digits known.
        assert float(value) == pytest.approx(expected, abs=1e-7)


def test_float32_is_kept_in_x64_mode():
    probs, labels = np.full((3, 4), 0.25, np.float32), np.arange(3, dtype=np.int32)
    with jax.enable_x64():
        for metric in (calibration.brier_score, calibration.negative_log_likelihood):
            assert metric(probs, labels).dtype == jnp.float32
        for metric in (calibration.expected_calibration_error, calibration.top_label_brier_score):
            assert metric(probs[0], np.ones(4, bool)).dtype == jnp.float32


def ragged_samples(n=127, seed=1):
    r = np.random.default_rng(seed)
    confidence = r.random(n).astype(np.float32)
    confidence[:3] = 1, 0, 0.5
    return confidence, r.random(n) < confidence**2


def ragged_classes(n=127, k=7, seed=2):
    r = np.random.default_rng(seed)
    probs = softmax(3 * r.standard_normal((n, k))).astype(np.float32)
    return probs, r.integers(0, k, n)


def numpy_gaps(confidence, correct, index, bins):
    """(n_b, conf_b − acc_b) of the bins that hold samples."""
    counts, gaps = [], []
    for b in range(bins):
        inside = index == b
        if inside.any():
            counts.append(inside.sum())
            gaps.append(confidence[inside].mean() - correct[inside].mean())
    return np.array(counts), np.array(gaps)


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 400])
def test_even_bins_against_numpy(bins):
    confidence, correct = ragged_samples()
    exact = confidence.astype(np.float64)
    index = np.minimum(np.digitize(exact, np.arange(1, bins) / bins), bins - 1)
    n, gap = numpy_gaps(exact, correct, index, bins)
    ece = calibration.expected_calibration_error(confidence, correct, bins=bins)
    mce = calibration.maximum_calibration_error(confidence, correct, bins=bins)
    assert float(ece) == pytest.approx((n * abs(gap)).sum() / len(exact), abs=1e-6)
    assert float(mce) == pytest.approx(abs(gap).max(), abs=1e-6)


@pytest.mark.parametrize("bins", [1, 4, 15, 126, 127, 400])
def test_equal_mass_bins_against_numpy(bins):
    confidence, correct = ragged_samples()
    order = np.argsort(confidence)
    pieces = [piece for piece in np.array_split(order, bins) if piece.size]
    expected = sum(
        len(piece) * abs(confidence[piece].mean(dtype=np.float64) - correct[piece].mean())
        for piece in pieces
    )
    ece = calibration.expected_calibration_error(confidence, correct, bins=bins, equal_mass=True)
    assert float(ece) == pytest.approx(expected / len(order), abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_integers_are_sorted_as_the_numbers_that_they_stand_for(dtype):
    r = np.random.default_rng(0)
    values = r.permutation([-np.inf, -3, -2.5, -1e-4, 0, 1e-4, 0.3, 1, 7, np.inf, np.nan])
    order = np.asarray(jnp.argsort(sortable(jnp.asarray(values, dtype))))
    np.testing.assert_array_equal(values[order], np.sort(values))


@pytest.mark.parametrize("bin_size", [1, 10, 100, 1000])
def test_rms_takes_the_root_of_the_mean_square(bin_size):
    confidence, correct = ragged_samples()
    pieces = np.array_split(np.argsort(confidence), max(1, len(confidence) // bin_size))
    squares = [
        len(p) * (confidence[p].mean(dtype=np.float64) - correct[p].mean()) ** 2 for p in pieces
    ]
    rms = calibration.rms_calibration_error(confidence, correct, bin_size=bin_size)
    assert float(rms) == pytest.approx(np.sqrt(sum(squares) / len(confidence)), abs=1e-6)


def test_hendrycks_rms_is_a_fixed_function_of_the_true_one_when_bins_agree():
    confidence, correct = ragged_samples(n=600)
    true = calibration.rms_calibration_error(confidence, correct)
    value = calibration.hendrycks_rms(confidence, correct)
    assert float(value) ** 2 * np.sqrt(6) == pytest.approx(float(true), rel=1e-5)


def test_a_confidence_on_an_edge_belongs_to_the_bin_above():
    # As float32, 0.3 lies above 3/10 and 0.7 below 7/10: both are edges all the same.
    for edge in (0.1, 0.3, 0.7, 0.9):
        confidence = np.array([edge, np.nextafter(np.float32(edge), np.float32(0))], np.float32)
        counts = calibration.CalibrationState.create(10).update(confidence, [1, 1]).compute()
        above = round(10 * edge)
        assert counts.bin_count[above] == 1
        assert counts.bin_count[above - 1] == 1


def test_the_last_bin_is_closed():
    result = calibration.CalibrationState.create(15).update([1.0, 0.0], [True, False]).compute()
    assert result.bin_count.tolist() == [1] + 13 * [0] + [1]
    assert float(calibration.expected_calibration_error([1.0, 0.0], [True, False])) == 0
    assert float(calibration.expected_calibration_error([1.0, 0.0], [False, True])) == 1


def test_equal_confidences_share_a_bin_whatever_their_order():
    confidence = np.array([0.5] * 6 + [0.9] * 4, np.float32)
    correct = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1, 0])
    for order in (np.arange(10), np.arange(10)[::-1], np.random.default_rng(0).permutation(10)):
        ece = calibration.expected_calibration_error(
            confidence[order], correct[order], bins=5, equal_mass=True
        )
        assert float(ece) == pytest.approx(0.4 * 0.15, abs=1e-7)


@pytest.mark.parametrize("equal_mass", [False, True])
def test_weights_of_zero_remove_and_whole_weights_repeat(equal_mass):
    confidence, correct = ragged_samples()
    keep = correct | (np.arange(confidence.size) % 3 > 0)
    ece = functools.partial(calibration.expected_calibration_error, equal_mass=equal_mass)
    spoiled = np.where(keep, confidence, np.nan)
    masked = ece(spoiled, correct, weights=keep)
    assert float(masked) == pytest.approx(float(ece(confidence[keep], correct[keep])), abs=1e-6)
    assert float(masked) != pytest.approx(float(ece(confidence, correct)), abs=1e-4)
    if not equal_mass:
        times = np.arange(confidence.size) % 4
        repeated = ece(confidence.repeat(times), correct.repeat(times))
        weighted = ece(confidence, correct, weights=times)
        assert float(weighted) == pytest.approx(float(repeated), abs=1e-6)


WEIGHTED = ("ece", "ece_equal_mass", "mce", "rms", "gap")


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_count_by_their_ratios_alone(name):
    confidence, correct = ragged_samples()
    weights = np.random.default_rng(0).integers(0, 4, confidence.size).astype(np.float64)
    metric = SAMPLE_METRICS[name]
    expected = float(metric(confidence, correct, weights=weights))
    assert expected != pytest.approx(float(metric(confidence, correct)), abs=1e-4)
    for scale in (1e-50, 1e-40, 1e38, 1e300):  # float32 holds none of them, or not their sum
        assert float(metric(confidence, correct, weights=scale * weights)) == pytest.approx(
            expected, abs=1e-6
        )
    large = jax.jit(metric)(confidence, correct, weights=np.float32(1e38) * weights)
    assert float(large) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", WEIGHTED)
def test_nothing_to_measure_is_an_error_outside_jit_and_nan_inside(name):
    confidence, correct = ragged_samples(n=20)
    metric, nothing = SAMPLE_METRICS[name], np.zeros(20, bool)
    with pytest.raises(ValueError, match="all 20 weights are 0"):
        metric(confidence, correct, weights=nothing)
    assert np.isnan(jax.jit(metric)(confidence, correct, weights=nothing))


def test_shapes_of_tokens_are_flattened():
    confidence, correct = ragged_samples(n=120)
    for name, metric in SAMPLE_METRICS.items():
        flat, shaped = (metric(confidence.reshape(s), correct.reshape(s)) for s in (120, (4, 30)))
        assert float(flat) == float(shaped), name


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=40, max_size=40))
def test_errors_are_bounded_and_independent_of_order(pairs):
    confidence = np.array([p for p, _ in pairs], np.float32)
    correct = np.array([a for _, a in pairs])
    backwards = slice(None, None, -1)
    values = {name: float(m(confidence, correct)) for name, m in SAMPLE_METRICS.items()}
    # Near 0 a root magnifies the rounding below it: what is compared is what it was taken of.
    roots = {"rms": 2, "hendrycks": 4, "l2": 2}
    for name, metric in SAMPLE_METRICS.items():
        again, power = float(metric(confidence[backwards], correct[backwards])), roots.get(name, 1)
        assert values[name] ** power == pytest.approx(again**power, abs=2e-6), name
        assert -1e-6 <= abs(values[name]) <= 1 + 1e-6, name
    assert abs(values["gap"]) <= values["ece"] + 1e-6 <= values["mce"] + 2e-6
    exact = confidence.astype(np.float64)
    assert values["brier"] == pytest.approx(np.mean((exact - correct) ** 2), abs=1e-6)


@pytest.mark.parametrize("name", SAMPLE_METRICS)
def test_a_calibrated_and_a_hopeless_model(name):
    sure = np.ones(120, np.float32)
    assert float(SAMPLE_METRICS[name](sure, sure > 0)) == pytest.approx(0, abs=1e-6)
    # Equal confidences share a bin, so even Hendrycks' squared shares sum to 1.
    assert float(SAMPLE_METRICS[name](sure, sure == 0)) == pytest.approx(1, abs=1e-6)


def test_float32_sums_do_not_drift_with_many_samples():
    n = 3_000_001
    values = jnp.full((n, 1), 0.1, jnp.float32)
    total = float(sums_by_bin(values, jnp.zeros(n, jnp.int32), 2)[0, 0])
    assert total == pytest.approx(n * float(np.float32(0.1)), rel=1e-6)
    naive = float(np.cumsum(np.full(n, 0.1, np.float32))[-1])
    assert naive != pytest.approx(n * float(np.float32(0.1)), rel=1e-4)


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_class_metrics_against_numpy(name):
    probs, labels = ragged_classes()
    n, k = probs.shape
    p, onehot = probs.astype(np.float64), np.eye(k)[labels]

    def per_class(bins, adaptive=False, threshold=-1.0):
        errors = []
        for j in range(k):
            kept = p[:, j] > threshold
            q, a = p[kept, j], onehot[kept, j]
            edges = np.arange(1, bins) / bins
            if adaptive:
                ranks = np.array([round(Fraction(i * q.size, bins)) for i in range(bins)])
                edges = np.sort(q)[np.minimum(ranks, q.size - 1)][1:]
            count, gap = numpy_gaps(q, a, np.digitize(q, edges), bins)
            errors.append((count * abs(gap)).sum() / q.size)
        return np.mean(errors)

    def reliability():
        total = 0
        for j in range(k):
            count, gap = numpy_gaps(p[:, j], onehot[:, j], np.floor(p[:, j] * 15), 15)
            total += (count * gap**2).sum() / n
        return total

    expected = {
        "brier": lambda: ((p - onehot) ** 2).sum(1).mean(),
        "nll": lambda: -np.log(p[np.arange(n), labels]).mean(),
        "sce": lambda: per_class(30),
        "classwise": lambda: per_class(15),
        "ace": lambda: per_class(30, adaptive=True),
        "tace": lambda: per_class(30, adaptive=True, threshold=0.01),
        "decomposition": reliability,
        "uncertainty": lambda: 1 - (onehot.mean(0) ** 2).sum(),
    }[name]()
    assert float(CLASS_METRICS[name](probs, labels)) == pytest.approx(expected, abs=1e-6)


def test_the_threshold_is_used_and_may_leave_nothing():
    probs, labels = ragged_classes()
    tace = calibration.thresholded_adaptive_calibration_error
    ace = calibration.adaptive_calibration_error(probs, labels)
    assert float(tace(probs, labels, threshold=0.0)) == float(ace)
    assert abs(float(tace(probs, labels)) - float(ace)) > 1e-3
    assert float(tace(probs, labels, threshold=1.0)) == 0


@pytest.mark.parametrize("bins", [1, 15])
def test_the_brier_decomposition_adds_up(bins):
    probs, labels = ragged_classes()
    d = calibration.brier_decomposition(probs, labels, bins=bins)
    total = d.reliability - d.resolution + d.uncertainty + d.within_bins
    assert float(total) == pytest.approx(float(calibration.brier_score(probs, labels)), abs=1e-6)
    frequency = np.bincount(labels, minlength=7) / len(labels)
    assert float(d.uncertainty) == pytest.approx(1 - (frequency**2).sum(), abs=1e-6)
    assert float(d.resolution) == pytest.approx(0, abs=1e-7) if bins == 1 else d.resolution > 0.01


def test_debiasing_removes_what_chance_adds():
    r = np.random.default_rng(5)
    confidence = r.random((200, 150)).astype(np.float32)
    correct = r.random((200, 150)) < confidence
    squared = jax.vmap(lambda p, a: calibration.debiased_l2(p, a, debias=False) ** 2)
    plug_in = float(jnp.mean(squared(confidence, correct)))
    debiased = float(calibration.debiased_l2(confidence[0], correct[0]))
    # 10 samples a bin, accuracies spread over [0, 1]: E ȳ(1 − ȳ)/n = 1/6/10.
    assert plug_in == pytest.approx(1 / 60, rel=0.1)
    assert debiased**2 < plug_in
    single = calibration.debiased_l2(confidence[0, :5], correct[0, :5], bins=5)
    assert float(single) == 0


def test_smooth_error_of_one_sided_residuals_is_their_mean():
    # Smoothing moves errors about but cannot cancel errors of one sign, so no binning can differ.
    r = np.random.default_rng(3)
    confidence = (0.3 + 0.4 * r.random(4000)).astype(np.float32)
    smooth = calibration.smooth_calibration_error(confidence, np.zeros(4000))
    assert float(smooth) == pytest.approx(float(confidence.mean()), abs=5e-3)
    calibrated = calibration.smooth_calibration_error(confidence, r.random(4000) < confidence)
    assert 0.001 < float(calibrated) < 0.03


@pytest.mark.parametrize(("n", "power"), [(127, 2.0), (127, 0.4), (3000, 1.0)])
def test_smooth_error_against_direct_smoothing_in_float64(n, power):
    r = np.random.default_rng(n)
    confidence = r.beta(3, 1, n).astype(np.float32).astype(np.float64)
    correct = r.random(n) < confidence**power

    def error(width):
        t = np.linspace(0, 1, max(200, round(10 / width)))[:, None]
        kernel = 0
        for image in (confidence, -confidence, 2 - confidence):
            near = np.abs(t - image) <= 0.5
            kernel = kernel + near * np.exp(-((t - image) ** 2) / (2 * width**2))
        return np.abs(kernel @ (confidence - correct)).sum() / kernel.sum()

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < error(middle) else (low, middle)
    value = calibration.smooth_calibration_error(confidence, correct)
    assert float(value) == pytest.approx(error(high), rel=1e-3)
    assert error(high) > 0.005


def test_the_narrowest_bandwidth_is_read_on_a_fine_mesh():
    # Exactly calibrated: the error, and with it the bandwidth, falls to the smallest tried.
    confidence = np.full(1000, 0.5, np.float32)
    correct = np.arange(1000) % 2 == 0
    assert float(calibration.smooth_calibration_error(confidence, correct)) < 1e-6


def test_smooth_errors_of_many_sets_are_those_of_each():
    """Though they share the kernels of the bandwidths that they try."""
    r = np.random.default_rng(5)
    confidence = r.random((6, 300)).astype(np.float32)
    chance = np.array([0.2, 0.5, 0.8, 1.0, 1.2, 3.0])[:, None]
    correct = r.random((6, 300)) < confidence**chance
    each = [
        calibration.smooth_calibration_error(*one) for one in zip(confidence, correct, strict=True)
    ]
    together = jax.vmap(calibration.smooth_calibration_error)(confidence, correct)
    np.testing.assert_allclose(together, each, rtol=1e-5)
    assert np.ptp(each) > 0.1  # of several bandwidths


@pytest.mark.parametrize("name", SAMPLE_METRICS)
@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, np.inf])
def test_invalid_confidences_raise_outside_jit_and_give_nan_inside(name, bad):
    confidence, correct = ragged_samples(n=50)
    confidence[17] = bad
    metric = SAMPLE_METRICS[name]
    with pytest.raises(ValueError, match=r"confidence must be a probability .* at \[17\]"):
        metric(confidence, correct)
    assert np.isnan(jax.jit(metric)(confidence, correct))


def test_an_invalid_confidence_alone_in_its_bin_is_not_passed_over():
    confidence, correct = ragged_samples(n=5)
    alone = functools.partial(calibration.debiased_l2, bins=5)
    assert float(jax.jit(alone)(confidence, correct)) == 0
    confidence[2] = np.nan
    assert np.isnan(jax.jit(alone)(confidence, correct))


@pytest.mark.parametrize("name", SAMPLE_METRICS)
def test_invalid_correctness_raises_outside_jit_and_gives_nan_inside(name):
    confidence, correct = ragged_samples(n=50)
    labels = np.where(np.arange(50) == 3, 2, correct)
    with pytest.raises(ValueError, match=r"correct must be 0 or 1, got 2 at \[3\]"):
        SAMPLE_METRICS[name](confidence, labels)
    assert np.isnan(jax.jit(SAMPLE_METRICS[name])(confidence, labels))


@pytest.mark.parametrize("name", CLASS_METRICS)
@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_invalid_probabilities_raise_outside_jit_and_give_nan_inside(name, bad):
    probs, labels = ragged_classes(n=50)
    probs[17, (labels[17] + 1) % 7] = bad
    with pytest.raises(ValueError, match=r"probs must lie in \[0, 1\], got .* at \[17, "):
        CLASS_METRICS[name](probs, labels)
    assert np.isnan(jax.jit(CLASS_METRICS[name])(probs, labels))


@pytest.mark.parametrize("name", CLASS_METRICS)
@pytest.mark.parametrize("bad", [-1, -100, 7])
def test_invalid_labels_raise_outside_jit_and_give_nan_inside(name, bad):
    probs, labels = ragged_classes(n=50)
    labels[17] = bad
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 7\), got {bad} at \[17\]"):
        CLASS_METRICS[name](probs, labels)
    assert np.isnan(jax.jit(CLASS_METRICS[name])(probs, labels))


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_rows_above_one_raise_outside_jit_and_give_nan_inside(name):
    probs, labels = ragged_classes(n=50)
    probs[17] = 0.5
    with pytest.raises(ValueError, match=r"sum of a row of probs must be at most 1, got 3.5 at"):
        CLASS_METRICS[name](probs, labels)
    assert np.isnan(jax.jit(CLASS_METRICS[name])(probs, labels))
    # bfloat16 rounds each of many probabilities: its rows may exceed 1 by more.
    rounded = jnp.asarray(np.full((50, 7), 1.02 / 7), jnp.bfloat16)
    assert np.isfinite(jax.jit(CLASS_METRICS[name])(rounded, labels))


def test_rounding_above_one_is_not_a_mistake():
    just_above = np.nextafter(np.float32(1), np.float32(2))
    ece = calibration.expected_calibration_error(np.array([just_above, 0.5]), [1, 1])
    assert float(ece) == pytest.approx(0.25)
    probs = np.array([[just_above, 0], [0.3, 0.7]], np.float32)
    assert float(calibration.brier_score(probs, [0, 1])) == pytest.approx(0.09, abs=1e-6)


def test_a_row_may_sum_to_less_than_one_but_not_to_more():
    part = np.full((4, 4), 0.1)
    nll = calibration.negative_log_likelihood(part, [0, 1, 2, 3])
    assert float(nll) == pytest.approx(np.log(10))
    with pytest.raises(ValueError, match=r"sum of a row of probs must be at most 1, got 2\.0 at"):
        calibration.brier_score(np.full((4, 4), 0.5), [0, 1, 2, 3])


def test_a_class_given_no_chance_costs_infinitely_much():
    assert np.isposinf(calibration.negative_log_likelihood([[0.0, 1.0]], [0]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_summed_in_float32(dtype):
    confidence, correct = ragged_samples(n=3000)
    probs, labels = ragged_classes()
    low, low_probs = jnp.asarray(confidence, dtype), jnp.asarray(probs / 2, dtype)
    for name, metric in SAMPLE_METRICS.items():
        got = metric(low, correct)
        assert got.dtype == jnp.float32, name
        assert float(got) == float(metric(low.astype(jnp.float32), correct)), name
    for name, metric in CLASS_METRICS.items():
        got = metric(low_probs, labels)
        assert got.dtype == jnp.float32, name
        assert float(got) == float(metric(low_probs.astype(jnp.float32), labels)), name


@pytest.mark.parametrize("name", ["binned", "bootstrap", "intervals", "selective", "state"])
def test_examples_of_the_documentation(name):
    module = importlib.import_module(f"lsce.calibration.{name}")
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.attempted > 0
    assert result.failed == 0


MISTAKES = [
    (lambda p, a: calibration.expected_calibration_error(p, a[1:]), ValueError, r"\(9,\).*\(10,\)"),
    (lambda p, a: calibration.expected_calibration_error(p[:0], a[:0]), ValueError, "no samples"),
    (lambda p, a: calibration.expected_calibration_error(p, a, bins=0), ValueError, "bins .* 0"),
    (lambda p, a: calibration.expected_calibration_error(p, a, bins=1.5), TypeError, "bins.*1.5"),
    (
        lambda p, a: calibration.maximum_calibration_error(p, a, equal_mass="no"),
        TypeError,
        "equal_mass='no'; must be True or False",
    ),
    (lambda p, a: calibration.debiased_l2(p, a, debias=0), TypeError, "debias=0; must be True"),
    (
        lambda p, a: calibration.expected_calibration_error(p, a, bins=True),
        TypeError,
        "bins.*True",
    ),
    (lambda p, a: calibration.expected_calibration_error(a, a), TypeError, "confidence .* bool"),
    (lambda p, a: calibration.expected_calibration_error(p, a, weights=-p), ValueError, "weights"),
    (
        lambda p, a: calibration.expected_calibration_error(p, a, weights=0 * p),
        ValueError,
        "all 10",
    ),
    (lambda p, a: calibration.expected_calibration_error(p, a, weights=p[1:]), ValueError, "shape"),
    (lambda p, a: calibration.rms_calibration_error(p, a, bin_size=-5), ValueError, "bin_size"),
    (lambda p, a: calibration.brier_score(p, a), ValueError, r"\[N, K\]"),
    (lambda p, a: calibration.brier_score(p[:, None], p), TypeError, "labels must be integers"),
    (lambda p, a: calibration.brier_score(p[:, None], [0]), ValueError, r"labels .*\(1,\)"),
    (
        lambda p, a: calibration.thresholded_adaptive_calibration_error(
            p[:, None], np.zeros(10, int), threshold=2.0
        ),
        ValueError,
        "threshold .* 2.0",
    ),
    (
        lambda p, a: calibration.thresholded_adaptive_calibration_error(
            p[:, None], np.zeros(10, int), threshold="0.5"
        ),
        TypeError,
        "threshold='0.5'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_mistakes_are_named(call, error, message):
    confidence, correct = ragged_samples(n=10)
    with pytest.raises(error, match=message):
        call(confidence, correct)


def test_shapes_are_checked_under_jit_too():
    confidence, correct = ragged_samples(n=10)
    with pytest.raises(ValueError, match="correct has shape"):
        jax.jit(calibration.expected_calibration_error)(confidence, correct[1:])


@pytest.mark.parametrize("name", SAMPLE_METRICS)
def test_sample_metrics_under_jit_and_vmap(name):
    confidence, correct = ragged_samples(n=120)
    metric = SAMPLE_METRICS[name]
    confidence, correct = confidence.reshape(3, 40), correct.reshape(3, 40)
    together = jax.jit(jax.vmap(metric))(confidence, correct)
    apart = [float(metric(*rows)) for rows in zip(confidence, correct, strict=True)]
    np.testing.assert_allclose(together, apart, atol=1e-6)
