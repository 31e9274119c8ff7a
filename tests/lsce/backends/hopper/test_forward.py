"""The loss of each token and its exact gradients, interpreted."""

import jax.numpy as jnp
import numpy as np
import pytest
from contract import Case, assert_no_worse, assert_stats, case, ours
from hopper_on_cpu import CANDIDATE

from lsce.backends import hopper

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((130, 72, 300), {"label_smoothing": 0.1, "z_loss": 1e-2, "weights": True}),
        (
            (20, 64, 131),
            {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7, "bias": True}
            | {"head_layout": "dv"},
        ),
        ((1, 64, 2), {}),
    ],
)
def test_exact(shape, options):
    this = case(shape, "bfloat16", **options)
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options)
    assert_no_worse(got, this)
    assert_stats(got, this)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [None, 2.0**-12])
def test_a_large_bias_does_not_reach_the_rows_that_fill_a_block(epsilon):
    """Their logits are the bias, and its exponential is infinite in float32."""
    this = case((20, 64, 131), "bfloat16", label_smoothing=0.1, bias=True)
    bias = this.inputs.bias.copy()
    bias[7] = 200.0
    this = Case(this.inputs._replace(bias=bias), this.options)
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=epsilon)
    assert_no_worse(got, this)
    for name, true in this.truth.grads.items():
        error = np.linalg.norm(got.grads[name].astype(np.float64) - true)
        assert error < 0.01 * np.linalg.norm(true), name


@pytest.mark.slow
def test_ignored_tokens_may_hold_nan():
    this = case((40, 64, 200), "bfloat16", label_smoothing=0.1)
    ignored = this.inputs.labels < 0
    assert ignored.any()
    given = this.inputs._replace(
        hidden=np.where(ignored[:, None], np.nan, this.inputs.hidden).astype(jnp.bfloat16)
    )
    with hopper.interpreted():
        got = ours(CANDIDATE, given, **this.options, gradient_filter="auto")
    assert_no_worse(got, this, slack=3.0)
