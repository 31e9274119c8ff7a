"""Gradients made in the forward pass, in Mosaic GPU's interpreter."""

import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Case, Result, assert_no_worse, case, ours
from hopper_on_cpu import CANDIDATE, problem
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

import lsce
from lsce.backends import Arrays, hopper
from lsce.backends.hopper import choose, fused, tiles
from lsce.backends.hopper.call import Call
from lsce.loss import weighted
from lsce.sparse import plan

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "layout", "options"),
    # Three groups of tokens, dC carried from one to the next; P of the last columns in dC, of which
    # the last tile is full or not.
    [
        ((700, 64, 256), (3, 1), {"label_smoothing": 0.1}),
        ((700, 64, 256), (3, 1), {"softcap": 4.0, "z_loss": 1e-2}),
        ((200, 512, 1024), (1, 2), {"label_smoothing": 0.1}),
        ((200, 512, 1001), (1, 2), {"softcap": 4.0, "z_loss": 1e-2}),
    ],
    ids=str,
)
def test_fused(shape, layout, options, monkeypatch):
    monkeypatch.setattr(tiles, "FUSED_BYTES", 512 * 256)
    this = case(shape, "bfloat16", **options)
    with hopper.interpreted():
        assert tiles.fused_layout(*shape, hopper.small_tiles().fused.tile_c) == layout
        got = ours(
            CANDIDATE, this.inputs, **this.options, gradient_filter="fused", return_stats=False
        )
    assert_no_worse(got, this, slack=3.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((400, 64, 256), [0, 1]), ((300, 512, 512), [1])],
    ids=["groups", "P within dC"],
)
def test_fused_leaves_out_tokens_without_a_loss(shape, blocks, monkeypatch):
    """Here all but 70, which fit a block: of one group of tokens in two nothing is left."""
    monkeypatch.setattr(tiles, "FUSED_BYTES", 512 * 256)
    computed, dense_work = [], plan.dense_work

    def recorded(blocks, live, *args, **options):
        jax.debug.callback(lambda live: computed.append(int(live)), live)
        return dense_work(blocks, live, *args, **options)

    monkeypatch.setattr(plan, "dense_work", recorded)
    this = case(shape, "bfloat16", label_smoothing=0.1, weights=True)
    keep = np.random.default_rng(3).permutation(np.flatnonzero(this.inputs.labels >= 0))[:70]
    ignored = ~np.isin(np.arange(shape[0]), keep)
    inputs = this.inputs._replace(labels=np.where(ignored, -100, this.inputs.labels))
    this = Case(inputs, this.options)
    hidden = np.where(ignored[:, None], np.nan, inputs.hidden).astype(inputs.hidden.dtype)
    options = this.options | {"gradient_filter": "fused", "return_stats": False}
    with hopper.interpreted():
        got = ours(CANDIDATE, inputs._replace(hidden=hidden), **options)
        jax.effects_barrier()
    assert sorted(computed) == blocks
    assert_no_worse(got, this, slack=3.0)
    assert not np.any(got.grads["hidden"][ignored])


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True], ids=["none with a loss", "an invalid label"])
def test_fused_of_no_labels_and_wrong_ones(wrong):
    given = case((40, 64, 256), "bfloat16").inputs
    labels = np.full_like(given.labels, -100)
    if wrong:
        labels[[3, 5]] = 7, 256
    options = {"gradient_filter": "fused", "return_stats": False, "label_smoothing": 0.1}
    with hopper.interpreted():
        got = ours(CANDIDATE, given._replace(labels=labels), **options, reduction="sum")
    if wrong:
        assert np.isnan(got.value)
        assert all(np.isnan(grad.astype(np.float32)).any() for grad in got.grads.values())
    else:
        assert got.value == 0.0
        assert not any(np.any(grad) for grad in got.grads.values())  # NaN counts as True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((400, 64, 256), (0, 1, 2)), ((200, 512, 512), (0,))],
    ids=["groups", "P within dC"],
)
def test_fused_gradients_do_not_depend_on_what_is_frozen(shape, wanted, monkeypatch):
    monkeypatch.setattr(tiles, "FUSED_BYTES", 512 * 256)
    given = case(shape, "bfloat16").inputs
    arrays = [jnp.asarray(x) for x in (given.hidden, given.head, np.linspace(0, 1, shape[0]))]

    def loss(hidden, head, weights):
        return lsce.linear_cross_entropy(
            hidden,
            head,
            given.labels,
            weights=weights,
            label_smoothing=0.1,
            reduction="sum",
            gradient_filter="fused",
            implementation="hopper",
        )

    with hopper.interpreted():
        both = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays)
        alone = {i: jax.jit(jax.grad(loss, argnums=i))(*arrays) for i in wanted}
    assert all(np.any(grad) for grad in both)
    losses = lsce.linear_cross_entropy(
        *arrays[:2], given.labels, label_smoothing=0.1, reduction="none"
    )
    for i, got in alone.items():
        if i < 2:
            np.testing.assert_array_equal(got, both[i])
        else:
            np.testing.assert_allclose(got, losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [8192, 16_384], ids=["P within dC", "groups"])
def test_fused_products_that_nobody_asked_for_are_not_made(n):
    p = problem(n=n, gradient_filter="fused")
    call = Call(p, None, choose.tiles_for(p), ctas=132)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((n, p.d), jnp.bfloat16),
            ((p.v, p.d), jnp.bfloat16),
            ((n,), jnp.int32),
            ((n,), jnp.float32),
        )
    ]

    def total(hidden, head, labels, weights):
        given = Arrays(hidden, head, labels)
        return weighted(hopper.BACKEND, p, given, weights, summed=True, call=call)[0]

    def kernels(argnums) -> list[bool]:
        step = jax.jit(jax.grad(total, argnums=argnums))
        text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        names = "probabilities", "hidden_gradient", "head_gradient"
        return [f"lsce_{name}" in text for name in names]

    assert kernels((0, 1)) == [True, True, True]
    assert kernels(0) == [True, True, False]
    assert kernels(1) == [True, False, True]
    assert kernels(3) == [False, False, False]


@pytest.mark.slow
def test_fused_programs_are_no_longer_for_more_tokens():
    def kernels(n: int) -> int:
        p = problem(n=n, gradient_filter="fused")
        call = Call(p, None, choose.tiles_for(p), ctas=132)
        assert tiles.fused_layout(n, p.d, p.v, call.tiles.fused.tile_c).groups > 2

        def total(hidden, head, labels):
            given, ones = Arrays(hidden, head, labels), jnp.ones(n, jnp.float32)
            return weighted(hopper.BACKEND, p, given, ones, summed=True, call=call)[0]

        arrays = (
            jax.ShapeDtypeStruct((n, p.d), jnp.bfloat16),
            jax.ShapeDtypeStruct((p.v, p.d), jnp.bfloat16),
            jax.ShapeDtypeStruct((n,), jnp.int32),
        )
        step = jax.jit(jax.grad(total, argnums=(0, 1)))
        text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        return len(re.findall(r"call @(probabilities|accumulate_hidden|head_gradient)", text))

    # For the first group, those between and the last; P is made twice, of nothing the second time.
    assert kernels(131_072) == kernels(16_384) == 12


def with_losses(this: Case, *factors: float) -> tuple[Case, np.ndarray]:
    """Tokens whose hidden states are so many times as long, and which they are."""
    weights = 1.0 if this.inputs.weights is None else this.inputs.weights
    tokens = np.flatnonzero((this.inputs.labels >= 0) & (weights != 0.0))[-len(factors) :]
    hidden = this.inputs.hidden.copy()
    hidden[tokens] = hidden[tokens] * np.array(factors)[:, None]
    return Case(this.inputs._replace(hidden=hidden), this.options), tokens


@pytest.fixture
def made_again(monkeypatch) -> list[int]:
    """Receives how many tokens of each group are computed a second time."""
    seen, run_forward = [], fused.run_forward

    def recorded(*args):
        jax.debug.callback(lambda live: seen.append(int(live)), args[-1])
        return run_forward(*args)

    monkeypatch.setattr(fused, "run_forward", recorded)
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter's products
@pytest.mark.parametrize(
    ("shape", "groups", "options"),
    [
        ((700, 64, 256), 3, {"z_loss": 1e-4, "weights": True}),
        ((200, 512, 1024), 1, {"label_smoothing": 0.1}),
    ],
    ids=["groups", "P within dC"],
)
def test_fused_beyond_its_range(shape, groups, options, made_again, monkeypatch):
    """Losses of 100s and 1,000s of nats, whose P is made again, in their group alone."""
    monkeypatch.setattr(tiles, "FUSED_BYTES", 512 * 256)
    this, tokens = with_losses(case(shape, "bfloat16", **options), 60.0, 150.0, 1000.0)
    with hopper.interpreted():
        got = ours(
            CANDIDATE, this.inputs, **this.options, gradient_filter="fused", return_stats=False
        )
        jax.effects_barrier()
    for loss, least in zip(this.truth.stats.loss[tokens], (104, 300, 1000), strict=True):
        assert loss > least
    assert len(made_again) == groups
    assert np.count_nonzero(made_again) == 1
    assert_no_worse(got, this)
    for token in tokens:
        true = this.truth.grads["hidden"][token]
        off = np.linalg.norm(got.grads["hidden"][token] - true)
        assert off < 0.02 * np.linalg.norm(true)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_fused_of_what_is_not_finite(wrong, made_again):
    """Made again once, and not finite still; the other tokens' gradients are as ever."""
    given = case((40, 64, 256), "bfloat16").inputs
    token = np.flatnonzero(given.labels >= 0)[0]
    hidden = given.hidden.copy()
    hidden[token, 0] = wrong
    options = {"gradient_filter": "fused", "return_stats": False}
    with hopper.interpreted():
        got = ours(CANDIDATE, given._replace(hidden=hidden), **options)
        right = ours(CANDIDATE, given, **options)
        jax.effects_barrier()
    assert [live > 0 for live in made_again] == [True, False]
    assert not np.isfinite(got.value)
    assert not np.isfinite(got.grads["hidden"][token].astype(np.float32)).all()
    others = np.arange(40) != token
    np.testing.assert_array_equal(got.grads["hidden"][others], right.grads["hidden"][others])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_fused_removes_a_token_beyond_its_range(z_loss, made_again):
    this, (token,) = with_losses(
        case((40, 64, 256), "bfloat16", weights=True, z_loss=z_loss), 100.0
    )
    weights = this.inputs.weights.copy()
    weights[token] = 0.0
    this = Case(this.inputs._replace(weights=weights), this.options)
    assert this.truth.stats.loss[token] > 104
    options = this.options | {"gradient_filter": "fused", "return_stats": False}
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **options)
        jax.effects_barrier()
    assert made_again == [0]
    assert_no_worse(got, this)
    assert not np.any(got.grads["hidden"][token])


@pytest.mark.slow
def test_fused_keeps_what_small_weights_leave_of_a_token_that_r_misses(made_again):
    """Within the range of P̃, but a weight of 1e-25 over l would not be a number."""
    this, (token,) = with_losses(case((40, 64, 256), "bfloat16"), 6.0)
    assert 28 < this.truth.stats.loss[token] < 60
    options = this.options | {"gradient_filter": "fused", "return_stats": False}
    grads = []
    for scale in (1e-25, 1.0):
        weights = np.where(this.inputs.labels >= 0, np.float32(scale), np.float32(0.0))
        with hopper.interpreted():
            got = ours(CANDIDATE, this.inputs._replace(weights=weights), **options, reduction="sum")
            jax.effects_barrier()
        grads.append(np.float64(got.grads["hidden"][token]) / scale)
    assert [live > 0 for live in made_again] == [True, False]
    assert np.linalg.norm(grads[1]) > 0
    assert np.linalg.norm(grads[0] - grads[1]) < 0.02 * np.linalg.norm(grads[1])


def fp8(this: Case, *, detect_races: bool = False, **options) -> Result:
    options = this.options | {"gradient_filter": "fp8", "return_stats": False} | options
    with hopper.interpreted(detect_races=detect_races):
        return ours(CANDIDATE, this.inputs, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
def test_fp8_makes_the_gradients_of_few_tokens_in_the_forward(monkeypatch):
    """With most of P in dC, which is written in four steps: no step overwrites what one reads."""
    with_gradients = Mock(side_effect=fused.with_gradients)
    monkeypatch.setattr(fused, "with_gradients", with_gradients)
    this, _ = with_losses(case((200, 256, 1024), "bfloat16", label_smoothing=0.1), 100.0)
    assert tiles.layout_within_dc(200, 256, 1024, 256) == (1, 1)
    got = fp8(this, detect_races=True)
    assert not gpu_callbacks.get_races().races_found
    assert with_gradients.called
    assert_no_worse(got, this)
    with_gradients.reset_mock()
    each = Case(this.inputs, this.options | {"reduction": "none"})
    assert_no_worse(fp8(each), each)
    assert not with_gradients.called


@pytest.mark.parametrize(
    ("shape", "in_the_forward"),
    [
        ((2048, 2048, 151_936), True),  # the last tile is not full
        ((2048, 640, 262_144), True),  # a small call
        ((4096, 640, 262_144), False),
        ((32_768, 576, 49_152), True),  # few classes, in groups of tokens
        ((32_768, 768, 50_257), False),  # whose last tile is not full
        ((8192, 768, 50_257), True),  # which is small
        ((8192, 4096, 32_000), True),
        ((32_768, 4096, 32_000), True),
        ((8192, 2304, 256_000), False),
    ],
    ids=str,
)
def test_where_fp8_is_made_in_the_forward(shape, in_the_forward):
    p = problem(n=shape[0], d=shape[1], v=shape[2], gradient_filter="fp8")
    assert (hopper.BACKEND.unfused(p) is None) == in_the_forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "argnums", "in_the_forward"),
    [
        ({}, (0, 1), True),
        ({}, 1, True),
        ({}, 0, False),
        ({"n": 2560}, (0, 1), False),
        ({"precision": "fp8"}, (0, 1), False),
    ],
    ids=[
        "",
        "frozen hidden",
        "frozen head",
        "more tokens",
        "a forward in 8 bits",
    ],
)
def test_where_fp8_makes_them_in_the_forward(changes, argnums, in_the_forward):
    p = problem(**{"n": 2048, "gradient_filter": "fp8"} | changes)
    arrays = (
        jax.ShapeDtypeStruct((p.n, p.d), jnp.bfloat16),
        jax.ShapeDtypeStruct((p.v, p.d), jnp.bfloat16),
        jax.ShapeDtypeStruct((p.n,), jnp.int32),
    )

    def total(hidden, head, labels):
        given, ones = Arrays(hidden, head, labels), jnp.ones(p.n, jnp.float32)
        return weighted(hopper.BACKEND, p, given, ones, summed=True)[0]

    step = jax.jit(jax.grad(total, argnums=argnums))
    text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    names = "change_entries", "tail_terms"
    assert [f"lsce_{name}" in text for name in names] == [in_the_forward, not in_the_forward]


@pytest.mark.slow
def test_fused_scales_its_gradients_by_a_factor_that_bfloat16_does_not_hold():
    given = case((40, 64, 256), "bfloat16").inputs

    def loss(hidden, head, factor):
        return factor * lsce.linear_cross_entropy(
            hidden, head, given.labels, gradient_filter="fused", implementation="hopper"
        )

    with hopper.interpreted():
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        one, scaled = (
            step(jnp.asarray(given.hidden), jnp.asarray(given.head), jnp.float32(factor))
            for factor in (1.0, 0.7012)
        )
    for before, after in zip(one, scaled, strict=True):
        before, after = (np.asarray(x, np.float64).ravel() for x in (before, after))
        assert before @ after / (before @ before) == pytest.approx(0.7012, rel=1e-3)


@pytest.mark.slow
def test_the_derivative_of_a_scan():
    """Whose body JAX takes apart, to make once what does not change: the kernels' buffers among it.

    Three parts of a batch and one head, against the derivatives one by one.
    """
    given = case((120, 64, 256), "bfloat16").inputs
    hidden, head = given.hidden.reshape(3, 40, 64), jnp.asarray(given.head)
    labels = jnp.asarray(given.labels).reshape(3, 40)

    def loss(hidden, head, labels):
        return lsce.linear_cross_entropy(
            hidden,
            head,
            labels,
            label_smoothing=0.1,
            reduction="sum",
            gradient_filter="fused",
            implementation="hopper",
        )

    def total(hidden, head):
        add = lambda so_far, part: (so_far + loss(part[0], head, part[1]), None)  # noqa: E731
        return jax.lax.scan(add, jnp.float32(0.0), (hidden, labels))[0]

    with hopper.interpreted():
        value, (d_hidden, d_head) = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, head)
        each = jax.jit(jax.value_and_grad(loss, (0, 1)))
        some = [each(*part) for part in zip(hidden, [head] * 3, labels, strict=True)]
    assert value == pytest.approx(float(sum(value for value, _ in some)), rel=1e-6)
    np.testing.assert_array_equal(d_hidden, np.stack([grads[0] for _, grads in some]))
    expected = sum(np.asarray(grads[1], np.float32) for _, grads in some)
    off = np.linalg.norm(np.asarray(d_head, np.float32) - expected)
    assert 0 < off < 0.01 * np.linalg.norm(expected)  # the sum of bfloat16 is rounded
