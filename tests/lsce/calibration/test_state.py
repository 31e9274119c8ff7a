"""CalibrationState: exact, mergeable, of fixed size, inside every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import on_devices
import pytest

from lsce.calibration import CalibrationState, expected_calibration_error
from lsce.calibration.exact import as_float, as_uint32, carry, sums_by_bin


def samples(n=1000, seed=0):
    r = np.random.default_rng(seed)
    confidence = r.random(n).astype(np.float32)
    return confidence, r.random(n) < confidence


def assert_same(a: CalibrationState, b: CalibrationState):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_result_against_numpy():
    confidence, correct = samples()
    result = CalibrationState.create(bins=8).update(confidence, correct).compute()
    p, index = confidence.astype(np.float64), np.floor(confidence * 8).astype(int)
    n = np.bincount(index, minlength=8)
    accuracy = np.bincount(index, correct, minlength=8) / n
    mean = np.bincount(index, p, minlength=8) / n
    gap = abs(accuracy - mean)
    assert result.count == 1000
    assert result.invalid == 0
    assert float(result.accuracy) == pytest.approx(correct.mean(), abs=1e-7)
    assert float(result.confidence) == pytest.approx(p.mean(), abs=1e-6)
    assert float(result.gap) == pytest.approx(p.mean() - correct.mean(), abs=1e-6)
    assert float(result.ece) == pytest.approx((n * gap).sum() / 1000, abs=1e-6)
    assert float(result.rms) == pytest.approx(np.sqrt((n * gap**2).sum() / 1000), abs=1e-6)
    assert float(result.mce) == pytest.approx(gap.max(), abs=1e-6)
    np.testing.assert_array_equal(result.bin_count, n)
    np.testing.assert_allclose(result.bin_accuracy, accuracy, atol=1e-6)
    np.testing.assert_allclose(result.bin_confidence, mean, atol=1e-6)


def test_any_split_in_any_order_gives_the_same_bits():
    confidence, correct = samples()
    whole = CalibrationState.create().update(confidence, correct)
    order = np.random.default_rng(1).permutation(1000)
    state = CalibrationState.create()
    for part in np.split(order, [1, 1, 500]):
        state = state.update(confidence[part], correct[part])
    assert_same(state, whole)
    left = CalibrationState.create().update(confidence[:500], correct[:500])
    right = CalibrationState.create().update(confidence[500:], correct[500:])
    assert_same(left.merge(right), whole)
    assert_same(right.merge(left), whole)
    assert_same(whole.merge(CalibrationState.create()), whole)


def test_jit_scan_and_donation():
    confidence, correct = samples(1024)
    whole = CalibrationState.create().update(confidence, correct)

    def step(state, batch):
        return state.update(*batch), None

    batches = confidence.reshape(16, 8, 8), correct.reshape(16, 8, 8)
    scanned, _ = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(CalibrationState.create(), batches)
    assert_same(scanned, whole)

    update = jax.jit(CalibrationState.update, donate_argnums=0)
    state = CalibrationState.create()
    for p, a in zip(*batches, strict=True):
        state = update(state, p, a)
    assert_same(state, whole)


def test_masked_samples_may_hold_anything():
    confidence, correct = samples(100)
    mask = np.arange(100) % 3 > 0
    spoiled = np.where(mask, confidence, np.nan)
    kept = CalibrationState.create().update(confidence[mask], correct[mask])
    assert_same(CalibrationState.create().update(spoiled, correct, mask), kept)
    assert_same(
        jax.jit(CalibrationState.update)(CalibrationState.create(), spoiled, correct, mask), kept
    )
    nothing = CalibrationState.create().update(spoiled, correct, np.zeros(100, bool))
    assert_same(nothing, CalibrationState.create())


def test_agrees_with_the_pure_function():
    confidence, correct = samples()
    ece = CalibrationState.create(30).update(confidence, correct).compute().ece
    assert float(ece) == pytest.approx(
        float(expected_calibration_error(confidence, correct, bins=30)), abs=1e-6
    )


@pytest.mark.parametrize("bad", [np.nan, -0.5, 1.5, np.inf])
def test_invalid_confidences_raise_outside_and_are_counted_inside_jit(bad):
    confidence, correct = samples(100)
    confidence[[4, 5]] = bad
    with pytest.raises(ValueError, match=r"confidence must be a probability .* at \[4\] \(2 such"):
        CalibrationState.create().update(confidence, correct)
    state = jax.jit(CalibrationState.update)(CalibrationState.create(), confidence, correct)
    result = state.merge(CalibrationState.create().update(*samples())).compute()
    assert result.invalid == 2
    assert result.count == 1098
    for name in ("accuracy", "confidence", "gap", "ece", "rms", "mce"):
        assert np.isnan(getattr(result, name)), name


def test_invalid_correctness_is_counted_inside_jit():
    result = jax.jit(CalibrationState.update)(
        CalibrationState.create(), np.array([0.5, 0.5]), np.array([2, 1])
    ).compute()
    assert result.invalid == 1
    assert np.isnan(result.accuracy)


def test_a_state_that_saw_nothing_claims_nothing():
    result = CalibrationState.create(4).compute()
    assert result.count == 0
    assert np.isnan(result.ece)
    assert result.bin_count.tolist() == [0, 0, 0, 0]
    assert (
        CalibrationState.create(4).update(np.zeros(0, np.float32), np.zeros(0)).compute().count == 0
    )


def test_totals_stay_exact_far_beyond_float32():
    confidence, correct = samples()
    once = CalibrationState.create().update(confidence, correct)
    state = once
    for _ in range(21):
        state = state.merge(state)
    many, few = state.merge(once).compute(), once.compute()
    assert int(many.count) == 1000 * 2**21 + 1000
    for name in ("accuracy", "confidence", "ece", "rms", "mce"):
        assert float(getattr(many, name)) == pytest.approx(float(getattr(few, name)), abs=1e-6)
    for _ in range(20):
        state = state.merge(state)
    assert int(state.compute().count) == 2**32 - 1
    assert float(state.compute().ece) == pytest.approx(float(few.ece), abs=1e-6)


def test_exact_sums_carry():
    values = jnp.full((70_001, 1), 2**24, jnp.uint32)
    limbs = sums_by_bin(values, jnp.zeros(70_001, jnp.int32), 2)
    total = 70_001 * 2**24
    expected = [total >> (16 * i) & 0xFFFF for i in range(4)]
    assert limbs[0, 0].tolist() == expected
    assert limbs[1, 0].tolist() == [0, 0, 0, 0]
    assert float(as_float(limbs)[0, 0]) == pytest.approx(total, rel=1e-7)
    assert int(as_uint32(limbs)[0, 0]) == 2**32 - 1
    full = jnp.array([2**32 - 1, 2**32 - 2**17, 7, 1], jnp.uint32)
    value = (2**32 - 1) + (2**32 - 2**17 << 16) + (7 << 32) + (1 << 48)
    assert carry(full).tolist() == [value >> (16 * i) & 0xFFFF for i in range(4)]


def test_mistakes_are_named():
    state = CalibrationState.create(5)
    with pytest.raises(ValueError, match="5 and 6 bins"):
        state.merge(CalibrationState.create(6))
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        CalibrationState.create(0)
    with pytest.raises(ValueError, match=r"correct has shape \(3,\)"):
        state.update(np.full(2, 0.5), np.ones(3))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        state.update(np.full(2, 0.5), np.ones(2), np.ones(3, bool))
    with pytest.raises(TypeError, match="mask must be boolean, got dtype int"):
        state.update(np.full(2, 0.5), np.ones(2), np.ones(2, np.int32))
    with pytest.raises(TypeError, match="confidence must be a float array"):
        state.update(np.ones(2, np.int32), np.ones(2))


ON_FOUR_DEVICES = """
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from lsce import calibration
    from lsce.calibration import CalibrationState

    assert jax.device_count() == 4
    r = np.random.default_rng(0)
    confidence = r.random((16, 50)).astype(np.float32)
    correct = r.random((16, 50)) < confidence
    whole = CalibrationState.create(7).update(confidence, correct)

    def check(state):
        jax.tree.map(np.testing.assert_array_equal, state, whole)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = dict(mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())

    def psummed(confidence, correct):
        return CalibrationState.create(7).update(confidence, correct).psum("data")

    check(jax.jit(jax.shard_map(psummed, **split))(confidence, correct))

    def scanned(confidence, correct):
        start = jax.lax.pcast(CalibrationState.create(7), "data", to="varying")
        state, _ = jax.lax.scan(lambda s, x: (s.update(*x), None), start, (confidence, correct))
        return state.psum("data")

    check(jax.jit(jax.shard_map(scanned, **split))(confidence, correct))

    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
        sharded = jax.device_put((confidence, correct), NamedSharding(mesh, P("data")))
        check(CalibrationState.create(7).update(*sharded))
        check(jax.jit(CalibrationState.create(7).update)(*sharded))
        for metric in (calibration.expected_calibration_error, calibration.rms_calibration_error):
            here, there = metric(confidence, correct), metric(*sharded)
            np.testing.assert_allclose(here, there, atol=1e-6)
    print("all the same")
"""


@pytest.mark.slow
def test_shard_map_scan_and_sharded_arrays_on_four_devices():
    assert on_devices.run(4, ON_FOUR_DEVICES) == "all the same"
