"""What rounding does to the targets' terms, and what dE gets back of it."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Candidate, Case, case, ours
from hopper_on_cpu import CANDIDATE
from scipy.special import log_softmax

from lsce import rounding
from lsce.backends import hopper
from lsce.backends.hopper import fused

BETA = 0.1
CHUNKED = Candidate("chunked")


def test_what_is_lost_is_what_a_conversion_loses():
    entry = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    stored = entry.astype(jnp.bfloat16).astype(np.float32)
    lost = jax.jit(rounding.lost, static_argnums=1)(entry, jnp.bfloat16)
    assert (np.asarray(lost) == entry - stored).all()
    assert (np.asarray(lost) != 0).mean() > 0.9


def test_what_is_no_number_loses_nothing():
    entry = jnp.array([np.nan, np.inf, -np.inf, 3.4e38, 0.0])
    assert (np.asarray(rounding.lost(entry, jnp.bfloat16)) == 0.0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_row_that_loses_nothing_is_not_pulled_by_what_the_head_holds(axis):
    head = jnp.array([[np.inf, np.nan], [1.0, 2.0]], jnp.bfloat16)
    head = head if axis == 0 else head.T
    e, labels = jnp.array([0.0, 0.5, 0.0]), jnp.array([0, 1, -1])
    given = rounding.given_back(e, head, labels, axis)
    assert np.asarray(given).tolist() == [[0.0, 0.0], [0.5, 1.0], [0.0, 0.0]]


class Likely:
    """A case whose labels are drawn by what the logits say of them, as a model's are, and what
    rounding the targets' terms makes of dE, ‖·‖ / ‖exact‖."""

    def __init__(self, **options):
        this = case((150, 64, 600), "bfloat16", label_smoothing=BETA, **options)
        hidden, head, labels, bias, weights = this.inputs
        vd = head if this.options.get("head_layout") != "dv" else head.T
        z = hidden.astype(np.float64) @ vd.astype(np.float64).T
        z = z if bias is None else z + bias.astype(np.float64)
        cap = this.options.get("softcap")
        z = z if cap is None else cap * np.tanh(z / cap)
        drawn = (z + np.random.default_rng(0).gumbel(size=z.shape)).argmax(1)
        labels = np.where(labels >= 0, drawn, labels).astype(np.int32)
        self.case = Case(this.inputs._replace(labels=labels), this.options)
        self.true = self.case.truth.grads["hidden"]
        z_target = np.take_along_axis(z, drawn[:, None], 1)[:, 0]
        p = np.exp(np.take_along_axis(log_softmax(z, axis=1), drawn[:, None], 1)[:, 0])
        slope = 1.0 if cap is None else 1.0 - (z_target / cap) ** 2
        w = np.where(labels >= 0, 1.0 if weights is None else weights, 0.0)
        entry = w * (p - (1 - BETA)) * slope / w.sum()
        e = entry - entry.astype(jnp.bfloat16).astype(np.float64)
        self.targets = float(np.linalg.norm(e[:, None] * vd[drawn].astype(np.float64)))
        self.targets /= float(np.linalg.norm(self.true))

    def error(self, hidden) -> float:
        off = hidden.astype(np.float64) - self.true
        return float(np.linalg.norm(off) / np.linalg.norm(self.true))


def assert_given_back(candidate: Candidate, this: Likely, most: float = 1.25, **options) -> None:
    got = ours(candidate, this.case.inputs, return_stats=False, **this.case.options, **options)
    rounded = this.error(this.true.astype(jnp.bfloat16))
    assert np.hypot(rounded, this.targets) > 1.1 * most * rounded  # what it would be
    assert this.error(got.grads["hidden"]) < most * rounded


OPTIONS = {
    "plain": {"spread": 3.0},
    "softcap": {"spread": 2.0, "softcap": 5.0},
    "bias": {"spread": 3.0, "bias": True},
}


@pytest.mark.parametrize(
    ("options", "layout"),
    [("plain", "vd"), ("plain", "dv"), ("softcap", "vd"), ("bias", "dv")],
)
def test_hidden_gradients_in_chunks_are_little_further_off_than_their_own_rounding(options, layout):
    assert_given_back(CHUNKED, Likely(**OPTIONS[options], head_layout=layout))


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    ("options", "gradient_filter"),
    [("plain", 2.0**-12), ("softcap", None)],
)
def test_hidden_gradients_on_hopper_are_little_further_off_than_their_own_rounding(
    options, gradient_filter
):
    with hopper.interpreted():
        assert_given_back(CANDIDATE, Likely(**OPTIONS[options]), gradient_filter=gradient_filter)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_hidden_gradients_made_in_the_forward_are_little_further_off_too(monkeypatch):
    made = Mock(wraps=fused.with_gradients)
    monkeypatch.setattr(fused, "with_gradients", made)
    with hopper.interpreted():
        assert_given_back(CANDIDATE, Likely(spread=3.0, weights=True), gradient_filter="fused")
    assert made.called
