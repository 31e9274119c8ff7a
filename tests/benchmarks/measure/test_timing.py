"""The timer."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.measure import timing


def test_a_short_call_is_launched_many_times_between_waits(monkeypatch: pytest.MonkeyPatch):
    clock = 0.0
    waits = []

    def call() -> str:
        nonlocal clock
        clock += 0.004
        return "result"

    def wait(result: str) -> None:
        nonlocal clock
        clock += 0.001
        waits.append(result)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    [measured] = timing.beside([call], wait, warmup=2, seconds=1.0)
    # A first sample of 5 ms: 20 launches make 100 ms, and ten such samples make a second.
    assert measured.launches == 20
    assert measured.samples == 10
    assert measured.p50_ms == pytest.approx(4.05)
    assert measured.p20_ms == pytest.approx(measured.p80_ms)
    assert waits == ["result"] * (2 + 1 + 1 + 10)


def test_a_slow_call_is_sampled_at_least_five_times(monkeypatch: pytest.MonkeyPatch):
    # Two more that are not counted: one to see how long it takes, one to warm up.
    durations = iter([1.0] * 3 + [1.0, 9.0] + [1.0, 2.0, 3.0, 4.0, 5.0])
    clock = 0.0

    def call() -> None:
        nonlocal clock
        clock += next(durations)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    [measured] = timing.beside([call], lambda result: None, warmup=3, seconds=1.0)
    assert (measured.samples, measured.launches) == (5, 1)
    assert (measured.p20_ms, measured.p50_ms, measured.p80_ms) == (1800, 3000, 4200)


def test_the_timer_wants_a_warm_up():
    with pytest.raises(ValueError, match="warmup=0"):
        timing.beside([lambda: None], lambda result: None, warmup=0)


def test_calls_beside_each_other_take_turns(monkeypatch: pytest.MonkeyPatch):
    clock, turns = 0.0, []

    def call(name: str, duration: float) -> None:
        nonlocal clock
        clock += duration
        turns.append(name)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    calls = functools.partial(call, "a", 0.02), functools.partial(call, "b", 0.05)
    a, b = timing.beside(calls, lambda result: None, warmup=1, seconds=0.5)
    assert (a.launches, a.samples, b.launches, b.samples) == (5, 5, 2, 5)
    assert (a.p50_ms, b.p50_ms) == pytest.approx((20, 50))
    assert "".join(turns[:4]) == "abab"  # the warm-up, and to see how long one takes
    rest = "".join(turns[4:])
    orders = [rest[i : i + 7] for i in range(0, len(rest), 7)]
    assert len(orders) == 1 + 5
    assert {*orders} == {"aaaaabb", "bbaaaaa"}
    # Every second order is the one before backwards.
    assert all(orders[i] != orders[i + 1] for i in range(0, len(orders), 2))


def test_the_product_is_timed_and_counted():
    product = timing.product(jnp.ones((8, 4)), jnp.ones((16, 4)))
    np.testing.assert_array_equal(product(), np.full((8, 16), 4.0))
    [measured] = timing.beside([product], seconds=0.01)
    assert 0 < measured.p20_ms <= measured.p50_ms <= measured.p80_ms
    # Two operations for each of N·D·V multiplications.
    assert timing.tflops(1000, 1000, 1000, 1.0) == pytest.approx(2.0)
    assert timing.tflops(1000, 1000, 1000, 1.0, products=3) == pytest.approx(6.0)
