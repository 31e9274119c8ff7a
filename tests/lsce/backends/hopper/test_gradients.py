"""Filtered gradients in Mosaic GPU's interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest
from contract import Case, Inputs, assert_no_worse, assert_stats, case, ours
from hopper_on_cpu import CANDIDATE

from lsce.backends import hopper
from lsce.sparse import filter as filtering

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "spread": 5.0},
        {"label_smoothing": 0.1, "spread": 5.0, "softcap": 15.0, "bias": True},
        # Nothing stands out: without the rule for flat blocks the gradient would be lost.
        {"label_smoothing": 0.1, "spread": 0.1},
    ],
    ids=["peaked", "softcap and bias", "flat"],
)
def test_filtered(options):
    this = case((150, 64, 600), "bfloat16", **options)
    epsilon = 2.0**-4 if options["spread"] < 1 else 2.0**-12
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=epsilon)
    assert_no_worse(got, this, slack=3.0)
    assert_stats(got, this, filtered=True)
    if "softcap" not in options:
        z = this.inputs.hidden.astype(np.float64) @ this.inputs.head.astype(np.float64).T
        p = np.exp(z - np.log(np.exp(z).sum(1, keepdims=True)))
        # At most: the kernel knows ε·Σ exp z only as it is over the columns so far.
        assert (got.stats.below_filter <= (p * (p < epsilon)).sum(1) + 1e-5).all()
    if options["spread"] < 1:
        assert (got.stats.below_filter[this.inputs.labels >= 0] > 0.9).all()
    else:
        assert 0 < got.stats.below_filter.mean() < 0.1


@pytest.mark.slow
def test_what_is_no_class_is_not_smoothed():
    """The last tile is computed, and what fills it up there stands for a class unlike the others:
    under the cap its slope is 0, while theirs is 1."""
    this = case((150, 64, 600), "bfloat16", label_smoothing=0.5, softcap=5.0, spread=0.1)
    head = this.inputs.head.copy()
    head[-1] = 3 * np.sign(this.inputs.hidden.astype(np.float32).mean(0))
    this = Case(this.inputs._replace(head=head), this.options)
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=2.0**-2)
    assert (got.stats.below_filter[this.inputs.labels >= 0] > filtering.FLAT).all()
    assert_no_worse(got, this)


@pytest.mark.slow
def test_a_given_order_changes_the_gradients_within_what_the_filter_may():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((150, 64)).astype(jnp.bfloat16)
    head = (rng.standard_normal((1000, 64)) * 5 / 8).astype(jnp.bfloat16)
    labels = (hidden.astype(np.float32) @ head.astype(np.float32).T).argmax(1)
    this = Case(Inputs(hidden, head, labels.astype(np.int32)), {"label_smoothing": 0.1})
    order = rng.permutation(1000).astype(np.int32)
    options = this.options | {"gradient_filter": 2.0**-6, "return_stats": False}
    with hopper.interpreted():
        plain, ordered = (
            ours(CANDIDATE, this.inputs, **options, **changes)
            for changes in ({}, {"vocab_order": order})
        )
    assert plain.value == ordered.value
    assert np.any(plain.grads["head"] != ordered.grads["head"])
    for got in (plain, ordered):
        for name, true in this.truth.grads.items():
            error = np.linalg.norm(got.grads[name].astype(np.float64) - true)
            assert error < 0.05 * np.linalg.norm(true), name
