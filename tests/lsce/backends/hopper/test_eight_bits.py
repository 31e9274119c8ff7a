"""The forward with 8-bit operands where that is enough, in Mosaic GPU's interpreter."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from contract import Case, Result, case, ours
from hopper_on_cpu import CANDIDATE, problem
from low_check import emulated

import lsce
from lsce import backends
from lsce.backends import hopper
from lsce.backends.hopper import eight_bits
from lsce.backends.hopper.call import call_of
from lsce.sparse import filter as filtering

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LARGE = 2.0**-2


@pytest.fixture
def of_any_size(monkeypatch) -> None:
    """8 bits where they would not pay, nearly everywhere, and a few columns again at a time."""
    monkeypatch.setattr(filtering, "low_forward_worthwhile", lambda problem: True)
    monkeypatch.setattr(eight_bits, "LARGE", LARGE)
    monkeypatch.setattr(eight_bits, "WIDTH", 256)


def run(this: Case, gradient_filter: float | str | None) -> Result:
    options = {"gradient_filter": gradient_filter, "return_stats": False, "precision": "fp8"}
    with hopper.interpreted():
        return ours(CANDIDATE, this.inputs, **this.options, **options)


def expected(this: Case) -> tuple[float, float]:
    """The mean loss, and the share of the columns in 16 bits."""
    losses, share = emulated(this, LARGE)
    w = np.where(this.inputs.labels >= 0, 1.0, 0.0)
    w = w if this.inputs.weights is None else w * this.inputs.weights
    return float(losses.sum() / w.sum()), share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spread", "least", "most"),
    # From their few labels alone everything would look large in flat logits.
    [(0.05, 0.0, 0.0), (4.0, 0.1, 0.8)],
)
def test_the_loss_is_what_8_bits_make_of_what_is_small(spread, least, most, of_any_size):
    this = case((150, 192, 600), "bfloat16", spread=spread, label_smoothing=0.1)
    value, share = expected(this)
    assert least <= share <= most
    got = run(this, None)
    assert abs(value - this.truth.value) > 1e-6
    np.testing.assert_allclose(got.value, value, rtol=1e-6, atol=2e-6)
    for name, true in this.truth.grads.items():
        error = np.linalg.norm(got.grads[name] - true) / np.linalg.norm(true)
        assert error < 0.01, name


@pytest.mark.slow
def test_with_every_option_and_a_filter(of_any_size, monkeypatch):
    monkeypatch.setattr(filtering, "log_epsilon", lambda *_: jnp.float32(math.log(2.0**-8)))
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.5}
    this = case((150, 64, 600), "bfloat16", spread=6.0, bias=True, weights=True, **options)
    value, share = expected(this)
    assert 0.02 < share < 0.9
    got = run(this, 2.0**-8)
    np.testing.assert_allclose(got.value, value, rtol=2e-6, atol=2e-6)
    for name, true in this.truth.grads.items():
        error = np.linalg.norm(got.grads[name] - true) / np.linalg.norm(true)
        assert error < 0.02, name


@pytest.mark.slow
def test_ignored_tokens_have_no_say_in_the_scales(of_any_size):
    """Whether or not there is a derivative."""
    this = case((150, 64, 600), "bfloat16", spread=0.5, label_smoothing=0.1)
    ignored = this.inputs.labels < 0
    assert ignored.any()
    hidden = np.where(ignored[:, None], 3e4, this.inputs.hidden).astype(jnp.bfloat16)
    this = dataclasses.replace(this, inputs=this.inputs._replace(hidden=hidden))
    value, share = expected(this)
    assert share < 0.5
    with hopper.interpreted():
        alone = lsce.linear_cross_entropy(
            *map(jnp.asarray, (hidden, this.inputs.head, this.inputs.labels)),
            implementation="hopper",
            label_smoothing=0.1,
            gradient_filter=None,
            precision="fp8",
        )
        alone = np.asarray(alone)
    for got in (alone, run(this, None).value):
        np.testing.assert_allclose(got, value, rtol=1e-6, atol=2e-6)


def test_explain_says_what_takes_16_bits():
    wanted = problem(precision="fp8")
    assert call_of(wanted).low
    assert "16 bits" not in backends.explain(wanted).reasons["hopper"]
    for changes, why in (
        ({"softcap": 30.0}, "a softcap"),
        ({"return_stats": True}, "statistics"),
        ({"gradient_filter": "fused"}, "fused"),
        ({"n": 64}, "too few"),
    ):
        other = dataclasses.replace(wanted, **changes)
        assert not call_of(other).low
        assert f"logits in 16 bits: {why}" in backends.explain(other).reasons["hopper"]
    assert not call_of(problem()).low


def test_a_precision_that_is_none():
    with pytest.raises(ValueError, match="precision='int8'"):
        problem(precision="int8")
