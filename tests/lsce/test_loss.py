"""The contract of the loss: every test here runs for every backend (see contract.py)."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import CANDIDATES, Case, Inputs, assert_no_worse, assert_stats, case, ours, truth

import lsce

SOME_OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "uncapped": {
        "label_smoothing": 0.1,
        "logit_scale": 1.3,
        "z_loss": 1e-2,
        "bias": True,
        "weights": True,
        "reduction": "none",
        "head_layout": "dv",
    },
    "everything": {
        "label_smoothing": 0.1,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "z_loss": 1e-2,
        "bias": True,
        "weights": True,
    },
}
MORE_OPTIONS = {
    "plain": {},
    "only smoothing": {"label_smoothing": 1.0},
    "sum": {"label_smoothing": 0.1, "reduction": "sum", "weights": True},
    "softcap": {"softcap": 2.0, "head_layout": "dv"},
    "bias": {"label_smoothing": 0.2, "bias": True},
    "peaked": {"label_smoothing": 0.1, "spread": 8.0},
}
# All the options in a backend's first dtype, some in its others.
DTYPES_AND_OPTIONS = [
    pytest.param(candidate, dtype, options, id=f"{candidate}-{dtype}-{name}", marks=candidate.marks)
    for candidate in CANDIDATES
    for dtype in candidate.dtypes
    for name, options in (
        SOME_OPTIONS | MORE_OPTIONS if dtype == candidate.dtypes[0] else SOME_OPTIONS
    ).items()
]
OTHER_SHAPES = [
    pytest.param(candidate, shape, id=f"{candidate}-{shape}", marks=candidate.marks)
    for candidate in CANDIDATES
    for shape in candidate.shapes[1:]
]


@pytest.fixture(params=[pytest.param(c, id=str(c), marks=c.marks) for c in CANDIDATES])
def candidate(request, monkeypatch, quickly_compiled):
    request.param.patch(monkeypatch)
    return request.param


@pytest.fixture
def this(candidate) -> Case:
    """The case for tests about something else than options."""
    return case(candidate.shapes[0], candidate.dtypes[0], label_smoothing=0.1)


@pytest.fixture
def loss(candidate):
    """The candidate's exact, smoothed loss of (hidden, head, labels)."""
    return functools.partial(
        lsce.linear_cross_entropy,
        label_smoothing=0.1,
        gradient_filter=None,
        implementation=candidate.implementation,
    )


@functools.lru_cache(maxsize=8)
def compiled(loss, **options):
    """The loss of (hidden, head) and its two gradients, as a function of all arrays."""

    def value(hidden, head, labels, arrays):
        return loss(hidden, head, labels, **arrays, **options)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


def value_and_grads(loss, given: Inputs, *, weights=None, bias=None, vocab_order=None, **options):
    """The loss of these inputs, arrays and options, and the gradients of hidden and head."""
    arrays = {"weights": weights, "bias": bias, "vocab_order": vocab_order}
    step = compiled(loss, **options)
    return jax.tree.map(np.asarray, step(given.hidden, given.head, given.labels, arrays))


def assert_equal(got, expected, **tolerance):
    """Equal pytrees; to the last bit unless a tolerance is given."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), **({"rtol": 0} | tolerance)
        ),
        got,
        expected,
    )


@pytest.mark.parametrize(
    ("candidate", "dtype", "options"), DTYPES_AND_OPTIONS, indirect=["candidate"]
)
def test_value_gradients_and_statistics(candidate, dtype, options):
    this = case(candidate.shapes[0], dtype, **options)
    got = ours(candidate, this.inputs, **this.options)
    assert_no_worse(got, this)
    assert_stats(got, this)


@pytest.mark.parametrize(("candidate", "shape"), OTHER_SHAPES, indirect=["candidate"])
def test_other_shapes(candidate, shape):
    this = case(shape, candidate.dtypes[0], label_smoothing=0.1, z_loss=1e-2)
    got = ours(candidate, this.inputs, **this.options)
    assert_no_worse(got, this)
    assert_stats(got, this)


@pytest.mark.parametrize("gradient_filter", ["auto", 2.0**-14, "fused", "hidden"])
def test_filters_stay_within_the_noise_of_bfloat16(candidate, gradient_filter):
    this = case(candidate.shapes[0], "bfloat16", label_smoothing=0.1, weights=True)
    got = ours(candidate, this.inputs, **this.options, gradient_filter=gradient_filter)
    assert_no_worse(got, this, slack=3.0)


def test_leading_axes(loss, this):
    given, n = this.inputs, len(this.inputs.labels) // 2
    hidden, labels = given.hidden[: 2 * n], given.labels[: 2 * n]
    flat = loss(hidden, given.head, labels, reduction="none", return_stats=True)
    deep = loss(
        hidden.reshape(2, n, -1),
        given.head,
        labels.reshape(2, n),
        reduction="none",
        return_stats=True,
    )
    assert deep[0].shape == (2, n)
    assert_equal(deep, jax.tree.map(lambda x: x.reshape(2, n), flat))


def test_one_token_without_axes(loss, this):
    given = this.inputs
    live = int(np.flatnonzero(given.labels >= 0)[0])
    alone = loss(given.hidden[live], given.head, given.labels[live], reduction="none")
    assert alone.shape == ()
    among = loss(given.hidden, given.head, given.labels, reduction="none")[live]
    assert_equal(alone, among, rtol=1e-5)


def test_ignored_tokens_may_hold_nan(loss, this):
    given = this.inputs
    ignored = given.labels == -100
    poisoned = given._replace(hidden=np.where(ignored[:, None], np.nan, given.hidden))
    poisoned = poisoned._replace(hidden=poisoned.hidden.astype(given.hidden.dtype))
    value, grads = value_and_grads(loss, poisoned)
    assert_equal((value, grads), value_and_grads(loss, given))
    assert ignored.any()
    assert not grads[0][ignored].any()


def test_removed_tokens_may_hold_nan(loss, this):
    given = this.inputs
    removed = np.arange(len(given.labels)) % 3 == 0
    weights = np.where(removed, 0.0, 1.0).astype(np.float32)
    hidden = np.where(removed[:, None], np.nan, given.hidden).astype(given.hidden.dtype)
    got = value_and_grads(loss, given._replace(hidden=hidden), weights=weights)
    ignored = given._replace(labels=np.where(removed, -100, given.labels))
    expected = value_and_grads(loss, ignored, weights=np.ones_like(weights))
    assert_equal(got, expected, rtol=1e-6)


def test_boolean_weights_are_a_mask(loss, this):
    given = this.inputs
    mask = np.arange(len(given.labels)) % 3 != 0
    labels = np.where(mask, given.labels, -100)
    assert_equal(
        loss(given.hidden, given.head, given.labels, weights=mask),
        loss(given.hidden, given.head, labels),
        rtol=1e-6,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_tokens_ignored(loss, this, reduction):
    given = this.inputs._replace(labels=np.full_like(this.inputs.labels, -100))
    value, grads = value_and_grads(loss, given, reduction=reduction)
    assert value == 0.0
    assert not any(np.any(grad) for grad in grads)  # NaN counts as True


def test_no_tokens(loss, this):
    given = this.inputs._replace(hidden=this.inputs.hidden[:0], labels=this.inputs.labels[:0])
    value, (d_hidden, d_head) = value_and_grads(loss, given)
    assert value == 0.0
    assert d_hidden.shape == given.hidden.shape
    assert not np.any(d_head)
    _, stats = loss(given.hidden, given.head, given.labels, return_stats=True)
    assert all(x.shape == (0,) for x in stats)


def test_an_invalid_label_is_nan(loss, this):
    given = this.inputs
    alone = np.arange(len(given.labels)) == 2

    @jax.jit
    def forward(labels):
        call = functools.partial(loss, given.hidden, given.head, labels)
        each, stats = call(reduction="none", return_stats=True)
        return each, stats.loss, call(return_stats=True)[1].loss, call(weights=1.0 - alone)

    for wrong in (-1, len(given.head), 2**31 - 1, -(2**31)):
        labels = given.labels.copy()
        labels[2] = wrong
        wrongly = given._replace(labels=labels)
        value, (d_hidden, d_head) = value_and_grads(loss, wrongly, reduction="sum")
        assert np.isnan(value)
        assert np.isnan(d_hidden[2]).any()
        assert np.isnan(d_head).any()
        *losses, removed = forward(labels)
        for each in losses:
            np.testing.assert_array_equal(np.isnan(each), alone, err_msg=str(wrong))
        assert np.isfinite(removed)


@pytest.mark.slow
def test_a_class_masked_by_its_bias(candidate, loss, this):
    """Without smoothing a bias of −∞ takes a class away, as padding of the vocabulary needs."""
    given = this.inputs
    v, kept = len(given.head), (2 * len(given.head)) // 3
    labels = np.where(given.labels < kept, given.labels, -100)
    bias = np.where(np.arange(v) < kept, 0.0, -np.inf).astype(given.head.dtype)
    masked = ours(candidate, given._replace(labels=labels, bias=bias))
    fewer = ours(candidate, given._replace(labels=labels, head=given.head[:kept]))
    assert_equal(masked.value, fewer.value, rtol=1e-5)
    tolerance = 8 * float(jnp.finfo(given.head.dtype).eps)
    assert_equal(masked.grads["hidden"], fewer.grads["hidden"], rtol=tolerance, atol=1e-6)
    assert_equal(masked.grads["head"][:kept], fewer.grads["head"], rtol=tolerance, atol=1e-6)
    assert not np.any(masked.grads["head"][kept:])
    assert_equal(masked.stats.entropy, fewer.stats.entropy, rtol=1e-4, atol=1e-5)
    # With smoothing every class is a target, that one too.
    forward = functools.partial(loss, given.hidden, given.head, bias=bias, return_stats=True)
    smoothed, stats = forward(labels)
    assert smoothed == np.inf
    np.testing.assert_array_equal(stats.mean_logit[labels >= 0], -np.inf)
    assert np.any(given.labels >= kept)
    assert forward(given.labels, label_smoothing=1.0)[0] == np.inf
    # Under a softcap its logit is −cap.
    options = {"label_smoothing": 0.1, "softcap": 3.0}
    capped = ours(candidate, given._replace(labels=labels, bias=bias), **options)
    expected = truth(given._replace(labels=labels, bias=bias), **options)
    assert_equal(capped.value, expected.value, rtol=1e-5)
    assert_equal(capped.stats.mean_logit, expected.stats.mean_logit, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(grad.astype(np.float32)).all() for grad in capped.grads.values())


@pytest.mark.parametrize("gradient_filter", [None, "fused"])
def test_an_infinite_loss_can_be_removed(loss, this, gradient_filter):
    """A label whose class a bias of −∞ takes away costs infinitely much, unless its weight is 0."""
    given = this.inputs
    labels, lost = given.labels.copy(), len(given.head) - 1
    labels[labels == lost] = 0
    bias = np.where(np.arange(len(given.head)) < lost, 0.0, -np.inf).astype(given.head.dtype)
    loss = functools.partial(loss, label_smoothing=0.0)
    options = {"bias": bias, "gradient_filter": gradient_filter}
    wrong = np.arange(len(labels)) % 3 == 0
    weights, ones = np.where(wrong, 0.0, 1.0).astype(np.float32), np.ones(len(labels), np.float32)
    removed = given._replace(labels=np.where(wrong, lost, labels))
    assert np.isposinf(value_and_grads(loss, removed, weights=ones, **options)[0])
    ignored = given._replace(labels=np.where(wrong, -100, labels))
    expected = value_and_grads(loss, ignored, weights=ones, **options)
    got = value_and_grads(loss, removed, weights=weights, **options)
    assert_equal(got, expected, rtol=1e-5, atol=1e-7)
    assert all(np.any(grad) for grad in got[1])


def test_large_logits(candidate):
    this = case(candidate.shapes[0], candidate.dtypes[0], label_smoothing=0.1, spread=3000.0)
    got = ours(candidate, this.inputs, **this.options)
    np.testing.assert_allclose(got.value, this.truth.value, rtol=1e-5)
    assert all(np.isfinite(grad.astype(np.float32)).all() for grad in got.grads.values())
    assert (got.stats.target_logit <= got.stats.lse).all()
    assert (got.stats.confidence <= 1.0).all()


def test_the_first_of_equal_logits_is_predicted(candidate, loss, this):
    given = this.inputs
    v, d = given.head.shape
    head = np.zeros((v, d), given.head.dtype)
    head[[v // 4, v - 1]] = 1.0  # equal, and in different tiles
    hidden = np.ones_like(given.hidden)
    _, stats = loss(hidden, head, np.zeros_like(given.labels), return_stats=True)
    np.testing.assert_array_equal(stats.prediction, v // 4)
    _, stats = loss(0 * hidden, head, np.zeros_like(given.labels), return_stats=True)
    np.testing.assert_array_equal(stats.prediction, 0)
    assert stats.correct.all()


def test_statistics_have_no_gradient(loss, this):
    given = this.inputs

    def total(hidden):
        _, stats = loss(hidden, given.head, given.labels, return_stats=True)
        return stats.lse.sum() + stats.entropy.sum()

    assert not np.any(jax.grad(total)(jnp.asarray(given.hidden)))


def test_vocab_order_changes_no_result(loss, this):
    given = this.inputs
    order = np.random.default_rng(0).permutation(len(given.head)).astype(np.int32)
    tolerance = 4 * float(jnp.finfo(given.head.dtype).eps)
    assert_equal(
        value_and_grads(loss, given, vocab_order=order),
        value_and_grads(loss, given),
        rtol=tolerance,
        atol=1e-6,
    )


def test_frozen_inputs_change_no_other_gradient(loss, this):
    """One function differentiated in several ways, whose traces JAX keeps and may mix up."""
    arrays = jnp.asarray(this.inputs.hidden), jnp.asarray(this.inputs.head)
    kept = jax.jit(lambda h, c: loss(h, c, this.inputs.labels))
    before = jax.grad(kept, argnums=(0, 1))(*arrays)
    assert all(np.any(grad) for grad in before)
    alone = jax.grad(kept, argnums=0)(*arrays), jax.grad(kept, argnums=1)(*arrays)
    assert_equal(alone, before, rtol=1e-5, atol=1e-7)
    after = jax.jit(jax.grad(jax.jit(kept), argnums=(0, 1)))(*arrays)
    assert_equal(after, before, rtol=1e-5, atol=1e-7)


def test_runs_are_equal_to_the_last_bit(loss, this):
    step = jax.jit(jax.value_and_grad(lambda h, c: loss(h, c, this.inputs.labels), argnums=(0, 1)))
    first, second = (step(this.inputs.hidden, this.inputs.head) for _ in range(2))
    assert_equal(first, second)


class TestTransforms:
    """Each transformation of the loss and its gradients, against a plain Python loop."""

    of_candidate: ClassVar = {}  # what the loop finds

    @pytest.fixture
    def batch(self, this) -> tuple[np.ndarray, np.ndarray]:
        """Three microbatches of hidden states and labels."""
        hidden, labels = this.inputs.hidden, this.inputs.labels
        rolls = (0, 1, 5)
        return (
            np.stack([np.roll(hidden, r, axis=1) for r in rolls]),
            np.stack([np.roll(labels, r) for r in rolls]),
        )

    @pytest.fixture
    def step(self, loss, this):
        def step(hidden, head, labels):
            value = functools.partial(loss, labels=labels)
            return jax.value_and_grad(value, argnums=(0, 1))(hidden, head)

        return step

    @pytest.fixture
    def looped(self, candidate, loss, batch, this):
        if str(candidate) not in self.of_candidate:
            steps = [
                value_and_grads(loss, this.inputs._replace(hidden=h, labels=y))
                for h, y in zip(*batch, strict=True)
            ]
            self.of_candidate[str(candidate)] = jax.tree.map(lambda *x: np.stack(x), *steps)
        return self.of_candidate[str(candidate)]

    def assert_same(self, got, looped):
        eps = float(jnp.finfo(looped[1][0].dtype).eps)
        assert_equal(got[0], looped[0], rtol=1e-6)
        assert_equal(got[1], looped[1], rtol=4 * eps, atol=1e-7)

    def test_eager(self, step, batch, looped, this):
        got = step(jnp.asarray(batch[0][0]), jnp.asarray(this.inputs.head), batch[1][0])
        self.assert_same(got, jax.tree.map(lambda x: x[0], looped))

    def test_vmap(self, step, batch, looped, this):
        got = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))(batch[0], this.inputs.head, batch[1])
        self.assert_same(got, looped)

    def test_scan(self, step, batch, looped, this):
        def body(carry, x):
            return carry, step(x[0], this.inputs.head, x[1])

        _, got = jax.jit(lambda xs: jax.lax.scan(body, None, xs))(batch)
        self.assert_same(got, looped)

    def test_checkpoint(self, loss, batch, looped, this, candidate):
        if candidate.variant == "interpreted":
            pytest.skip("the interpreter's callbacks are ordered, which jax.checkpoint refuses")
        saved = jax.checkpoint(lambda h, c: loss(h, c, batch[1][0]))
        arrays = jnp.asarray(batch[0][0]), jnp.asarray(this.inputs.head)
        jax.grad(saved)(*arrays)  # of a function that already knows another derivative
        got = jax.jit(jax.value_and_grad(saved, argnums=(0, 1)))(*arrays)
        self.assert_same(got, jax.tree.map(lambda x: x[0], looped))

    def test_donated_buffers(self, step, batch, looped, this):
        """An update in place of the head, whose buffer the compiled step may reuse."""

        @functools.partial(jax.jit, donate_argnums=1)
        def update(hidden, head, labels):
            value, (_, d_head) = step(hidden, head, labels)
            return value, head - d_head

        head = jnp.array(this.inputs.head)
        value, updated = update(batch[0][0], head, batch[1][0])
        assert head.is_deleted()
        assert_equal(value, looped[0][0], rtol=1e-6)
        eps = float(jnp.finfo(updated.dtype).eps)
        expected = this.inputs.head.astype(np.float64) - looped[1][1][0]
        assert_equal(updated, expected, rtol=2 * eps, atol=2 * eps)
