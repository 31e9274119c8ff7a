"""What the filter leaves out, in 8 bits, in Mosaic GPU's interpreter."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Case, Result, assert_no_worse, assert_stats, case, ours
from hopper_on_cpu import CANDIDATE, problem, watched_pairs
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from scipy.special import softmax
from tail_check import assert_terms

from lsce import backends
from lsce.backends import Arrays, hopper
from lsce.backends.hopper.call import call_of
from lsce.sparse import filter as filtering

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EPSILON = 2.0**-4


@pytest.fixture
def of_any_size(monkeypatch) -> list[np.ndarray]:
    """The tail where it would not pay, beside few pairs kept whole, which are listed."""
    for name in ("tail_worthwhile", "look_worthwhile"):
        monkeypatch.setattr(filtering, name, lambda *_: True)
    monkeypatch.setattr(filtering, "log_epsilon", lambda *_: jnp.float32(math.log(EPSILON)))
    return watched_pairs(monkeypatch)


def run(this: Case, gradient_filter: float | str, *, detect_races: bool = False) -> Result:
    with hopper.interpreted(detect_races=detect_races):
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=gradient_filter)
        jax.effects_barrier()
    return got


def error(got: Result, this: Case, name: str) -> float:
    true = this.truth.grads[name]
    return float(np.linalg.norm(got.grads[name] - true) / np.linalg.norm(true))


@pytest.mark.slow
def test_where_it_holds_nearly_all(of_any_size):
    """Also of classes of which no pair is kept, which a filter leaves without a gradient."""
    this = case((150, 64, 600), "bfloat16", spread=1.0, label_smoothing=0.1)
    got = run(this, "fp8")
    assert 0 < of_any_size[0].mean() < 0.5
    assert_no_worse(got, this)
    assert_stats(got, this, filtered=True)
    assert got.stats is not None
    assert got.stats.below_filter[this.inputs.labels >= 0].mean() > 0.5
    assert error(got, this, "hidden") < 0.006
    assert error(got, this, "head") < 0.005
    others = ~np.isin(np.arange(600), this.inputs.labels)
    true = this.truth.grads["head"][others]
    assert np.linalg.norm(got.grads["head"][others] - true) < 0.02 * np.linalg.norm(true)


@pytest.mark.slow
def test_a_chunk_has_room_for_all_of_its_pairs_in_16_bits(of_any_size, monkeypatch):
    """Its tiles of 16 bits are half as wide as those by which it is counted."""
    monkeypatch.setattr(filtering, "log_epsilon", lambda *_: jnp.float32(math.log(2.0**-12)))
    this = case((400, 64, 600), "bfloat16", spread=3.0, label_smoothing=0.1)
    got = run(this, "fp8")
    assert of_any_size[0].mean() > 0.6
    assert_no_worse(got, this)


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "in_8_bits"), [(0.1, True), (5.0, False)])
def test_auto_takes_it_where_the_filter_would_keep_most_blocks_whole(
    spread, in_8_bits, of_any_size, monkeypatch
):
    """Flat tokens without 16-bit pairs but for their labels', which are exact; others as ever."""
    monkeypatch.setattr(filtering, "worthwhile", lambda problem: True)
    this = case((150, 64, 600), "bfloat16", spread=spread, label_smoothing=0.1)
    got, filtered = (run(this, choice) for choice in ("auto", EPSILON))
    assert_no_worse(got, this, slack=3.0)
    assert_stats(got, this, filtered=True)
    assert got.value == filtered.value
    assert (of_any_size[0].mean() < of_any_size[1].mean()) == in_8_bits
    equal = [np.array_equal(got.grads[name], filtered.grads[name]) for name in got.grads]
    assert equal == [not in_8_bits] * 2
    if in_8_bits:
        assert of_any_size[1][:, 0].all()
        assert error(got, this, "hidden") < 0.006
        assert error(got, this, "head") < 0.005


@pytest.mark.slow
def test_flat_tokens_mark_no_more_than_fp8_would(of_any_size, monkeypatch):
    """At an ε as small as the filter's most columns have some token's, and all would be kept."""
    logs = {"auto": math.log(2.0**-8.5), "fp8": math.log(EPSILON)}
    monkeypatch.setattr(filtering, "worthwhile", lambda problem: True)
    monkeypatch.setattr(filtering, "log_epsilon", lambda name, *_: jnp.float32(logs[name]))
    this = case((150, 64, 600), "bfloat16", spread=0.3, label_smoothing=0.1)
    hidden, head = (x.astype(np.float64) for x in this.inputs[:2])
    p = softmax(hidden @ head.T, axis=1)
    p = p[this.inputs.labels >= 0]
    assert (p > 2.0**-8.5).any(0).mean() > 0.6
    assert np.where(p > 2.0**-8.5, p, 0.0).sum(1).mean() < 0.5
    got = run(this, "auto")
    assert of_any_size[0].mean() < 0.3
    assert_no_worse(got, this)
    assert error(got, this, "hidden") < 0.006
    assert error(got, this, "head") < 0.005


@pytest.mark.parametrize("choice", ["auto", "hidden"])
def test_nothing_is_dropped_under_a_softcap(choice):
    """With a filter training diverges there: see `lsce.sparse.filter`."""
    capped = problem(softcap=30.0, gradient_filter=choice)
    assert call_of(capped).tail
    assert not call_of(dataclasses.replace(capped, softcap=None)).tail
    assert call_of(dataclasses.replace(capped, gradient_filter=EPSILON)).epsilon == EPSILON
    assert "drop nothing: there is a softcap" in backends.explain(capped).reasons["hopper"]
    few = dataclasses.replace(capped, n=8)
    assert call_of(few).epsilon is None


@pytest.mark.slow
def test_not_a_bit_of_the_loss_depends_on_it(of_any_size):
    given = case((150, 64, 600), "bfloat16", spread=2.0).inputs
    p = problem(n=150, d=64, v=600, label_smoothing=0.1)
    arrays = Arrays(*map(jnp.asarray, given[:2]), jnp.maximum(given.labels, -1))
    losses = []
    for gradient_filter in ("fp8", EPSILON):
        with hopper.interpreted():
            call = call_of(dataclasses.replace(p, gradient_filter=gradient_filter))
            forward = jax.jit(lambda x, call=call: hopper.BACKEND.forward(call, x, keep=True)[0][0])
            losses.append(np.asarray(forward(arrays)))
    assert np.all(losses[0][given.labels >= 0] > 0)
    np.testing.assert_array_equal(*losses)


@pytest.mark.slow
def test_with_every_option(of_any_size):
    """What a filter drops is in none of these, nor what the cap makes of the smoothing.

    The second of two chunks ends beyond the last class.
    """
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 15.0}
    this = case((150, 64, 600), "bfloat16", spread=2.0, bias=True, weights=True, **options)
    got = run(this, "fp8", detect_races=True)
    assert not gpu_callbacks.get_races().races_found
    assert 0 < of_any_size[0].mean() < 0.5
    assert_no_worse(got, this)
    assert_stats(got, this, filtered=True)
    for name, most in {"hidden": 0.004, "head": 0.003, "bias": 0.003}.items():
        assert error(got, this, name) < most, name  # a filter's are .0098, .0047 and .0046


@pytest.mark.parametrize("cap", [pytest.param(None, marks=pytest.mark.slow), 9.0])
def test_terms_in_both_orders(cap):
    """To the bit what the formula makes of the 8-bit operands, and no race."""
    with hopper.interpreted(detect_races=True):
        assert hopper.interpret.active is not None
        params, tiles = hopper.interpret.active
        assert_terms(tiles.tail, cap, most=1e-4, interpret=params)
    assert not gpu_callbacks.get_races().races_found
