"""The tests' own instruments: the truth is true, and the tolerance lets no wrong gradient pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_no_worse, assert_stats, case, truth

import lsce

EVERYTHING = {
    "label_smoothing": 0.1,
    "softcap": 3.0,
    "logit_scale": 0.7,
    "z_loss": 1e-2,
    "bias": True,
    "weights": True,
}
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["hidden", "head", "bias", "weights"])
def test_true_gradients_are_the_slopes_of_the_true_value(name, reduction):
    this = case((7, 5, 11), **EVERYTHING, reduction=reduction)
    start = getattr(this.inputs, name).astype(np.float64)
    direction = np.random.default_rng(2).standard_normal(start.shape)
    step = 1e-6
    ahead, behind = (
        truth(this.inputs._replace(**{name: start + s * direction}), **this.options).value
        for s in (step, -step)
    )
    slope = np.vdot(this.truth.grads[name], direction)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7)


def test_truth_in_closed_form():
    """p = (1, 2, 4)/7 by its logits ln 1, ln 2, ln 4, so that z̄ = ln 2."""
    hidden, head = np.ones((1, 1)), np.log([[1.0], [2.0], [4.0]])
    given = case((1, 1, 3)).inputs._replace(hidden=hidden, head=head, labels=np.array([2]))
    got = truth(given, label_smoothing=0.3)
    p = np.array([1, 2, 4]) / 7
    np.testing.assert_allclose(got.value, np.log(7) - 0.7 * np.log(4) - 0.3 * np.log(2))
    np.testing.assert_allclose(got.grads["head"][:, 0], p - [0.1, 0.1, 0.8])
    np.testing.assert_allclose(got.stats.entropy, -(p * np.log(p)).sum())
    np.testing.assert_allclose(got.stats.sum_p_squared, 21 / 49)
    np.testing.assert_allclose(got.stats.confidence, 4 / 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_naive_loss_passes(dtype):
    this = case((127, 72, 257), dtype, label_smoothing=0.1)
    assert_no_worse(this.naive, this)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hidden", "head"])
def test_zeros_fail(dtype, name):
    this = case((127, 72, 257), dtype, label_smoothing=0.1)
    zeros = this.naive.grads | {name: np.zeros_like(this.naive.grads[name])}
    with pytest.raises(AssertionError, match=name):
        assert_no_worse(this.naive._replace(grads=zeros), this)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hidden", "head"])
def test_the_smoothing_term_left_out_fails(dtype, name):
    this = case((127, 72, 257), dtype, label_smoothing=0.1)
    # What is left: (1−β) of the target and all of the softmax.
    n, v = len(this.inputs.labels), len(this.inputs.head)
    live = this.inputs.labels >= 0
    e = this.inputs.hidden.astype(np.float64) * live[:, None] / live.sum()
    c = this.inputs.head.astype(np.float64)
    smoothing = {
        "hidden": np.broadcast_to(c.sum(0), (n, c.shape[1])) * live[:, None] / live.sum() * 0.1 / v,
        "head": np.broadcast_to(e.sum(0), c.shape) * 0.1 / v,
    }
    wrong = (this.truth.grads[name] + smoothing[name]).astype(this.naive.grads[name].dtype)
    with pytest.raises(AssertionError, match=name):
        assert_no_worse(this.naive._replace(grads=this.naive.grads | {name: wrong}), this)


def test_a_wrong_loss_fails():
    this = case((127, 72, 257), label_smoothing=0.1)
    without = this.naive.value + np.float32(1e-3)
    with pytest.raises(AssertionError, match="value"):
        assert_no_worse(this.naive._replace(value=without), this)


@pytest.mark.parametrize("field", lsce.TokenStats._fields)
def test_a_wrong_statistic_fails(field):
    this = case((127, 72, 257), label_smoothing=0.1)
    right = this.truth.stats
    single = lsce.TokenStats(*(x.astype(np.float32) if x.dtype == float else x for x in right))
    assert_stats(this.naive._replace(stats=single), this)
    values = getattr(single, field)
    changed = (values != 0) | (field == "below_filter")  # which is 0 without a filter
    wrong = ~values if field == "correct" else values + values.dtype.type(1) * changed
    with pytest.raises(AssertionError, match=field):
        assert_stats(this.naive._replace(stats=single._replace(**{field: wrong})), this)


def test_the_same_loss_and_gradients_as_optax():
    """The migration in two lines: no logits, no one-hot labels."""
    this = case((60, 24, 101)).inputs
    hidden, head, labels = jnp.asarray(this.hidden), jnp.asarray(this.head), abs(this.labels)

    def before(hidden, head):
        smooth = optax.smooth_labels(jax.nn.one_hot(labels, 101), 0.1)
        return optax.softmax_cross_entropy(hidden @ head.T, smooth).mean()

    def after(hidden, head):
        return lsce.linear_cross_entropy(hidden, head, labels, label_smoothing=0.1)

    old, new = (jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (before, after))
    np.testing.assert_allclose(new[0], old[0], rtol=1e-6)
    for got, expected in zip(new[1], old[1], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
        assert np.abs(expected).max() > 1e-3
