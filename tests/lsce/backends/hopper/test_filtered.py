"""What the filter leaves out of the gradients, and what stands in for it, in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Case, Inputs, assert_no_worse, case, ours
from hopper_on_cpu import CANDIDATE, watched_pairs
from jax import lax

import lsce
from lsce.backends import hopper
from lsce.backends.hopper import call

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quickly_compiled")]


@pytest.fixture
def active(monkeypatch) -> list[np.ndarray]:
    """The active (column tile, block) pairs of every backward pass that runs."""
    return watched_pairs(monkeypatch)


def peaked(n: int, v: int, **options) -> Case:
    """Tokens of four kinds, each with its few likely classes, the likeliest of them its label."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((4, 64))[np.arange(n) % 4] + 0.3 * rng.standard_normal((n, 64))
    head = rng.standard_normal((v, 64)) * 3 / 8
    labels = (hidden @ head.T).argmax(1).astype(np.int32)
    labels[::7] = -100
    return Case(Inputs(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), labels), options)


def filtered(this: Case, epsilon: float | str):
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=epsilon)
        jax.effects_barrier()
    return got


def error(got, this: Case, name: str) -> float:
    true = this.truth.grads[name]
    return float(np.linalg.norm(got.grads[name].astype(np.float64) - true) / np.linalg.norm(true))


def test_dropped_mass_pulls_along_no_masked_class(active):
    """Half of the classes are masked and their rows long: a plain mean would be all theirs."""
    this = peaked(120, 2048)
    head = this.inputs.head.copy()
    head[1::2] = 5.0
    bias = np.zeros(2048, np.float32)
    bias[1::2] = np.resize([-np.inf, -1e9, -40.0], 1024)
    bias[::2] = np.random.default_rng(1).standard_normal(1024)
    labels = np.where(this.inputs.labels % 2 == 1, this.inputs.labels - 1, this.inputs.labels)
    inputs = this.inputs._replace(head=head, labels=labels)
    this = Case(inputs._replace(bias=np.maximum(bias, -1e9)), {})  # as −∞, without 0 · ∞
    got = filtered(Case(inputs._replace(bias=bias), {}), 2.0**-7)
    assert not active[0].all()
    assert got.stats.below_filter[labels >= 0].mean() > 0.03
    assert error(got, this, "hidden") < 0.01


def test_what_no_token_needs_is_not_computed(active):
    """Nor by rows behind the last token's, of which the forward left no marks."""
    this = peaked(40, 600)
    got = filtered(this, 2.0**-6)
    assert active[0].shape == (5, 2)
    assert not active[0][:, 1].any()
    # 95 of the columns exceed ε or are a label: one tile, or two by a bound of the lse.
    assert 0 < active[0][:, 0].sum() <= 2
    assert error(got, this, "hidden") < 0.04


def test_the_filter_of_the_hidden_states_alone(active, monkeypatch):
    """dC is that of all tiles in the rows, too, that the filter leaves out of dE."""
    monkeypatch.setattr(call.filtering, "worthwhile", lambda problem: True)
    this = peaked(20, 600, label_smoothing=0.1, logit_scale=1.5)
    bias = np.random.default_rng(1).standard_normal(600).astype(np.float32)
    this = Case(this.inputs._replace(bias=bias), this.options)
    got = filtered(this, "hidden")
    assert active[0].sum() == 1
    assert error(got, this, "hidden") < 0.04
    assert error(got, this, "bias") < 0.004
    true = this.truth.grads["head"]
    size = np.linalg.norm(true, axis=1)
    off = np.linalg.norm(np.float64(got.grads["head"]) - true, axis=1)
    rare = size < np.median(size)  # with the filter on dC off by 0.42 of their size
    assert (size > 0).all()
    assert off[rare].sum() < 0.004 * size[rare].sum()
    assert off.sum() < 0.004 * size.sum()


def test_dropped_mass_pulls_as_far_as_the_cap_lets_it():
    """Where it lies the cap's slope is 0.4: a pull of the whole mass makes an error of 0.070."""
    this = case((20, 64, 2048), "bfloat16", spread=8.0, softcap=30.0, label_smoothing=0.2)
    got = filtered(this, 2.0**-2)
    assert got.stats.below_filter.mean() > 0.1
    assert error(got, this, "hidden") < 0.04


@pytest.mark.parametrize("how", ["vmap", "scan"])
def test_transformed_calls_are_filtered_calls(how, active):
    """Two batches against one call each: the same sums, and not every tile."""
    this = peaked(80, 600)
    hidden, labels = this.inputs.hidden.reshape(2, 40, 64), this.inputs.labels.reshape(2, 40)

    def loss(head, hidden, labels):
        return lsce.linear_cross_entropy(
            hidden,
            head,
            labels,
            reduction="sum",
            gradient_filter=2.0**-6,
            implementation="hopper",
        )

    def total(head, hidden):
        if how == "vmap":
            return jax.vmap(loss, (None, 0, 0))(head, hidden, labels).sum()
        add = lambda so_far, batch: (so_far + loss(head, *batch), None)  # noqa: E731
        return lax.scan(add, jnp.float32(0.0), (hidden, jnp.asarray(labels)))[0]

    with hopper.interpreted():
        got = jax.jit(jax.value_and_grad(total, (0, 1)))(this.inputs.head, hidden)
        jax.effects_barrier()
        assert active
        assert not any(pairs.all() for pairs in active)
        each = jax.jit(jax.value_and_grad(loss, (0, 1)))
        some = [each(this.inputs.head, *batch) for batch in zip(hidden, labels, strict=True)]
    assert float(got[0]) == pytest.approx(float(sum(value for value, _ in some)), rel=1e-5)
    d_head = sum(np.asarray(grads[0], np.float32) for _, grads in some)
    d_hidden = np.stack([np.asarray(grads[1], np.float32) for _, grads in some])
    for grad, expected in zip(got[1], (d_head, d_hidden), strict=True):
        off = np.linalg.norm(np.asarray(grad, np.float32) - expected)
        assert np.linalg.norm(expected) > 0
        assert off < 0.03 * np.linalg.norm(expected)


def test_fused_with_a_scale():
    this = case((40, 64, 256), "bfloat16", label_smoothing=0.1, logit_scale=0.3, z_loss=1e-2)
    with hopper.interpreted():
        got = ours(
            CANDIDATE, this.inputs, **this.options, gradient_filter="fused", return_stats=False
        )
    assert_no_worse(got, this)
