"""Temperature scaling and bootstrap intervals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsce import calibration
from lsce.calibration import bootstrap


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def labelled_logits(scale=1.0, n=800, k=5, seed=0):
    """Logits and labels drawn from their softmax; the logits are then multiplied by `scale`."""
    r = np.random.default_rng(seed)
    logits = 2 * r.standard_normal((n, k))
    labels = (r.random((n, 1)) > np.cumsum(softmax(logits), 1)[:, :-1]).sum(1)
    return scale * logits, labels


def slope(logits, labels, temperature):
    """d NLL / d (1/T) in float64."""
    p = softmax(logits.astype(np.float64) / temperature)
    target = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return ((p * logits).sum(1) - target).mean()


@pytest.mark.parametrize("x64", [False, True])
def test_the_temperature_agrees_with_an_independent_optimum(x64):
    r = np.random.default_rng(0)
    logits, u = 2 * r.standard_normal((2000, 4)), r.random(2000)
    labels = (u[:, None] > np.cumsum(softmax(logits / 2), 1)[:, :-1]).sum(1)
    with jax.enable_x64(x64):
        t = calibration.fit_temperature(logits, labels)
        nll = calibration.negative_log_likelihood(jax.nn.softmax(logits / t), labels)
        assert float(t) == pytest.approx(1.91064983, abs=1e-6)
        assert float(nll) == pytest.approx(1.09199375, abs=1e-6)


@pytest.mark.parametrize("scale", [0.01, 0.5, 1, 3, 400])
def test_the_slope_vanishes_at_the_temperature(scale):
    logits, labels = labelled_logits(scale)
    t = float(calibration.fit_temperature(logits, labels))
    assert t == pytest.approx(scale, rel=0.1)
    assert abs(slope(logits, labels, t)) < 1e-5 * scale
    assert abs(slope(logits, labels, 1.01 * t)) > 1e-3 * scale


def test_temperatures_that_do_not_exist_end_at_the_limits():
    logits, _ = labelled_logits()
    assert float(calibration.fit_temperature(logits, logits.argmax(1))) == pytest.approx(1e-3)
    assert float(calibration.fit_temperature(logits, logits.argmin(1))) == pytest.approx(1e3)


def test_impossible_classes_change_nothing():
    logits, labels = labelled_logits()
    padded = np.concatenate([logits, np.full((len(labels), 2), -np.inf)], axis=1)
    t = calibration.fit_temperature(padded, labels)
    assert float(t) == pytest.approx(float(calibration.fit_temperature(logits, labels)), rel=1e-6)
    assert np.isnan(calibration.fit_temperature(padded, np.where(labels == 0, 6, labels)))


def test_a_constant_added_to_a_row_changes_nothing():
    logits, labels = labelled_logits()
    t = calibration.fit_temperature(logits + 1000 * np.arange(len(labels))[:, None] % 7, labels)
    assert float(t) == pytest.approx(float(calibration.fit_temperature(logits, labels)), rel=1e-3)


def test_bad_logits_and_labels():
    logits, labels = labelled_logits(n=20)
    fit = calibration.fit_temperature
    for bad in (np.nan, np.inf):
        spoiled = logits.copy()
        spoiled[3, 2] = bad
        with pytest.raises(
            ValueError, match=rf"logits must be less than infinity.*{bad} at \[3, 2\]"
        ):
            fit(spoiled, labels)
        assert np.isnan(jax.jit(fit)(spoiled, labels))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\), got 5 at \[0\]"):
        fit(logits, np.full(20, 5))
    assert np.isnan(jax.jit(fit)(logits, np.full(20, 5)))
    with pytest.raises(ValueError, match=r"logits must have shape \[N, K\]"):
        fit(logits[0], labels)
    with pytest.raises(TypeError, match="logits must be a float array"):
        fit(labels[:, None], labels)


def mean(x):
    return jnp.mean(x)


def test_the_interval_of_a_mean_is_the_normal_one():
    x = np.random.default_rng(0).normal(3, 2, 400).astype(np.float32)
    for method in ("percentile", "basic"):
        low, estimate, high = calibration.bootstrap_interval(
            mean, x, key=jax.random.key(0), samples=4000, level=0.95, method=method
        )
        half = 1.96 * x.std() / np.sqrt(x.size)
        assert float(estimate) == pytest.approx(x.mean(), rel=1e-5)
        assert float(low) == pytest.approx(x.mean() - half, abs=0.1 * half)
        assert float(high) == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_arrays_are_resampled_together():
    x = np.arange(50, dtype=np.float32)
    low, estimate, high = calibration.bootstrap_interval(
        lambda a, b: jnp.max(jnp.abs(a - b)), x, x, key=jax.random.key(1), samples=20
    )
    assert float(low) == float(estimate) == float(high) == 0


def test_the_key_decides_and_batches_do_not(monkeypatch):
    x = np.random.default_rng(0).random(100).astype(np.float32)
    interval = functools.partial(calibration.bootstrap_interval, samples=11)
    first = interval(mean, x, key=jax.random.key(0))
    assert first == interval(mean, x, key=jax.random.key(0))
    assert first.low != interval(mean, x, key=jax.random.key(1)).low
    assert first.low < first.estimate < first.high
    monkeypatch.setattr("lsce.calibration.bootstrap.VALUES_AT_ONCE", 30)
    small = interval(lambda x: jnp.mean(x), x, key=jax.random.key(0))
    assert small.low < small.estimate < small.high


def test_error_bars_of_the_debiased_error():
    # Confidences that are 0.1 too high everywhere: the true L2 error is 0.1.
    r = np.random.default_rng(7)
    truth = 0.1 + 0.8 * r.random(3000)
    confidence, correct = (truth + 0.1).astype(np.float32), r.random(3000) < truth
    low, estimate, high = calibration.debiased_l2_interval(
        confidence, correct, key=jax.random.key(0), samples=200
    )
    assert float(estimate) == float(calibration.debiased_l2(confidence, correct))
    assert 0.05 < float(low) < 0.1 < float(high) < 0.15
    assert float(low) < float(estimate) < float(high)

    from lsce.calibration.bootstrap import _resample

    compiled = _resample._cache_size()
    again = calibration.debiased_l2_interval(
        confidence, correct, key=jax.random.key(0), samples=200
    )
    assert _resample._cache_size() == compiled
    assert again == (low, estimate, high)


def test_metrics_in_a_tree_have_the_intervals_that_each_has_alone():
    x = np.random.default_rng(0).normal(3, 2, 90).astype(np.float32)
    interval = functools.partial(calibration.bootstrap_interval, key=jax.random.key(0), samples=50)
    both = interval(lambda x: {"mean": jnp.mean(x), "top": jnp.max(x)}, x)
    assert both["mean"] == interval(mean, x)
    assert both["top"] == interval(jnp.max, x)
    assert both["mean"].low < both["mean"].high
    with pytest.raises(ValueError, match=r"scalar, got shape \(90,\)"):
        interval(lambda x: {"mean": jnp.mean(x), "all": x}, x)


def test_resamples_of_two_models_belong_together():
    """So that their differences are those of pairs, with nothing drawn again."""
    a, b = np.random.default_rng(0).normal(3, 2, (2, 90)).astype(np.float32)
    draw = functools.partial(bootstrap.resampled, key=jax.random.key(0), samples=50)
    apart = jax.tree.map(jnp.subtract, draw(mean, a), draw(mean, b))
    found = jax.tree.map(bootstrap.interval_of(0.8), *apart)
    interval = functools.partial(calibration.bootstrap_interval, key=jax.random.key(0), samples=50)
    paired = interval(lambda a, b: mean(a) - mean(b), a, b, level=0.8)
    np.testing.assert_allclose(found, paired, rtol=1e-4)
    assert found.low < found.estimate < found.high


def test_a_basic_interval_is_cut_to_where_the_metric_can_be():
    """Of predictions that are sure and mostly wrong, some resamples are all right."""
    confidence, correct = np.full(3, 0.99, np.float32), np.array([0, 0, 1])
    key = jax.random.key(0)
    draw = functools.partial(calibration.bootstrap_interval, ece, confidence, correct, key=key)
    loose, cut = draw(method="basic"), draw(method="basic", bounds=(0, 1))
    assert loose.high > 1.2
    assert cut == (loose.low, loose.estimate, 1.0)
    assert draw(bounds=(0, 0.5)) == draw()  # a percentile interval is inside as it is


def test_interval_mistakes_are_named():
    x, key = np.ones(5, np.float32), jax.random.key(0)
    interval = functools.partial(calibration.bootstrap_interval, key=key)
    with pytest.raises(ValueError, match=r"first axis .* \(5,\), \(4,\)"):
        interval(mean, x, x[1:])
    with pytest.raises(ValueError, match="no arrays at all"):
        interval(mean)
    with pytest.raises(ValueError, match=r"first axis of at least 1"):
        interval(mean, x[:0])
    with pytest.raises(ValueError, match=r"scalar, got shape \(5,\)"):
        interval(lambda x: x, x)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        interval(mean, x, samples=0)
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 95"):
        interval(mean, x, level=95)
    with pytest.raises(TypeError, match=r"key=0; must be a key such as jax.random.key\(0\)"):
        calibration.bootstrap_interval(mean, x, key=0)
    with pytest.raises(ValueError, match=r"method must be .* got 'bca'"):
        interval(mean, x, method="bca")
    with pytest.raises(ValueError, match=r"bounds must ascend, got \(1, 0\)"):
        interval(mean, x, bounds=(1, 0))
    with pytest.raises(ValueError, match="confidence must be a probability"):
        interval(calibration.expected_calibration_error, 2 * x, x)


ece = calibration.expected_calibration_error


def weighted_ece(confidence, correct, weights):
    return ece(confidence, correct, weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("live", [np.bool_, np.float64])
def test_samples_without_weight_do_not_widen_an_interval(live, jitted):
    """Drawn among all, resamples would hold any number of the live ones, at times none."""
    r = np.random.default_rng(0)
    confidence, correct = r.random(1000).astype(np.float32), r.random(1000) < 0.5
    weights = (np.arange(1000) % 200 == 7).astype(live)
    some = weights > 0
    interval = functools.partial(calibration.bootstrap_interval, ece, samples=2000)
    alone = interval(confidence[some], correct[some], key=jax.random.key(0))
    spoiled = np.where(some, confidence, np.nan)
    call = jax.jit(interval) if jitted else interval
    among = call(spoiled, correct, weights=weights * 3, key=jax.random.key(1))
    assert alone.low + 0.1 < alone.high
    np.testing.assert_allclose(among, alone, atol=0.03)


@pytest.mark.slow
def test_resamples_that_measure_nothing_are_left_out():
    r = np.random.default_rng(0)
    confidence, correct = r.random(1000).astype(np.float32), r.random(1000) < 0.5
    weights = np.arange(1000) % 200 == 7
    draw = functools.partial(calibration.bootstrap_interval, weighted_ece, key=jax.random.key(0))
    low, estimate, high = draw(confidence, correct, weights.astype(np.float32))
    assert low < estimate < high
    confidence[7] = np.nan
    assert np.isnan(jax.jit(draw)(confidence, correct, weights)).all()
