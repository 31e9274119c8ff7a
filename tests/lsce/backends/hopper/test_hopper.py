"""The Hopper kernels on a CPU: in Mosaic GPU's interpreter, and lowered for CUDA without a GPU.

On a Hopper GPU the whole contract of the loss runs against this backend (contract.py adds it). Here
each mode runs at a small ragged shape: the interpreter takes seconds for a chip's microseconds.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Candidate, Case, Inputs, assert_no_worse, assert_stats, case, ours
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

import lsce
from lsce import backends
from lsce.backends import hopper
from lsce.backends.hopper import fused, tiles
from lsce.backends.hopper import schedule as stretches
from lsce.backends.hopper.gradients import Call
from lsce.backends.hopper.kernels import combine as handover
from lsce.backends.hopper.kernels import marks
from lsce.backends.hopper.kernels.lse_forward import Sums
from lsce.backends.hopper.loss import most_frequent, places, token_losses
from lsce.problem import Problem
from lsce.sparse import filter as filtering
from lsce.sparse import plan

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CANDIDATE = Candidate("hopper", "interpreted", ("bfloat16",))
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@contextlib.contextmanager
def sixty_four_bits():
    """For all threads, the interpreter's among them, as `jax.enable_x64` is not."""
    jax.config.update("jax_enable_x64", True)
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield
    finally:
        jax.config.update("jax_enable_x64", False)


def problem(**changes) -> Problem:
    bf16 = np.dtype(jnp.bfloat16)
    base = Problem(
        n=8192, d=2304, v=256000, hidden_dtype=bf16, head_dtype=bf16, platform="gpu", chip=H100
    )
    return dataclasses.replace(base, **changes)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient_filter", "bias"), [(None, True), (2.0**-12, True), ("fused", False)]
)
def test_64_bit_mode_changes_nothing(gradient_filter, bias):
    this = case((40, 64, 256), "bfloat16", label_smoothing=0.1, weights=True, bias=bias)
    options = this.options | {"gradient_filter": gradient_filter, "return_stats": False}
    assert this.naive.value.dtype == np.float32  # computed before
    with hopper.interpreted(), sixty_four_bits():
        got = ours(CANDIDATE, this.inputs, **options)
    assert got.value.dtype == np.float32
    np.testing.assert_allclose(got.value, this.truth.value, rtol=1e-5)
    assert_no_worse(got, this)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "shape", "options", "epsilon"),
    [
        # Three stages a tile, of which the second consumer lags by one, and three column tiles.
        ({}, (130, 192, 600), {"label_smoothing": 0.1, "z_loss": 1e-2, "weights": True}, None),
        (
            {"tile_n": 128, "tile_d": 32},
            (150, 128, 520),
            {"label_smoothing": 0.1, "spread": 5.0, "softcap": 15.0, "bias": True},
            2.0**-12,
        ),
        ({}, (150, 128, 600), {"label_smoothing": 0.1, "spread": 5.0}, 2.0**-12),
        ({"tile_v": 256}, (70, 128, 600), {"label_smoothing": 0.1, "spread": 5.0}, 2.0**-12),
        # One stage, so no lag; no column for the second consumer.
        ({}, (1, 64, 2), {}, None),
    ],
)
def test_consumers_half_a_tile_apart(changes, shape, options, epsilon):
    this = case(shape, "bfloat16", **options)
    small = hopper.small_tiles()
    small = dataclasses.replace(small, forward=dataclasses.replace(small.forward, **changes))
    with hopper.interpreted(tiles=small):
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=epsilon)
    assert_no_worse(got, this, slack=3.0)
    assert_stats(got, this, filtered=epsilon is not None)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [None, 2.0**-12])
def test_few_blocks_at_a_time(epsilon, monkeypatch):
    """Both CTAs have a stretch of every block."""
    of = stretches.Stretches.of
    works = []
    monkeypatch.setattr(stretches.Stretches, "of", lambda *a: works.append(of(*a)) or works[-1])
    monkeypatch.setattr(tiles, "L2", 1)
    monkeypatch.setattr(stretches, "SHORTEST", 1)
    this = case((150, 64, 600), "bfloat16", label_smoothing=0.1, spread=5.0)
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=epsilon)
    assert (works[-1].pieces, works[-1].together) == (2, 1)
    assert works[-1].blocks > 2
    assert_no_worse(got, this, slack=1.0 if epsilon is None else 3.0)
    assert_stats(got, this, filtered=epsilon is not None)


@pytest.mark.slow
def test_of_equal_logits_the_first_class_is_predicted():
    # Columns 0 to 127 and 256 to 383 are the first consumer's.
    classes = [(300, 140), (140, 20), (290, 270), (450, 390, 300)]
    head = np.zeros((512, 128), np.float32)
    for token, equal in enumerate(classes):
        head[list(equal), token] = 1.0
    hidden = jnp.eye(4, 128, dtype=jnp.bfloat16)
    with hopper.interpreted():
        _, stats = lsce.linear_cross_entropy(
            hidden,
            jnp.asarray(head, jnp.bfloat16),
            jnp.zeros(4, jnp.int32),
            implementation="hopper",
            return_stats=True,
        )
    np.testing.assert_array_equal(stats.prediction, [min(equal) for equal in classes])


def test_sums_that_are_handed_over_join():
    """Those of some columns and of the others, against those of all."""
    x = np.random.default_rng(0).normal(size=(5, 40)) * 4
    x[0, 30] = x[0, 3] = 20.0
    k = 1.3

    def sums(part: slice):
        y, m = x[:, part], x[:, part].max(1)
        log_p = (y - m[:, None]) * k
        p = 2**log_p
        kept = (p * (log_p > -4)).sum(1)
        values = m, p.sum(1), y.sum(1), (p * log_p).sum(1), (p * p).sum(1), kept, (y * y).sum(1)
        named = dict(zip(("m", "l", "s", "w", "q", "kept", "squares"), values, strict=True))
        first = y.argmax(1) + (part.start or 0)
        return {name: jnp.float32(v) for name, v in named.items()} | {"best": jnp.int32(first)}

    a, b, both = sums(slice(0, 17)), sums(slice(17, 40)), sums(slice(0, 40))
    # What was kept is relative to no common bound here: by the rule of `l`.
    both["kept"] = a["kept"] * 2 ** ((a["m"] - both["m"]) * k)
    both["kept"] += b["kept"] * 2 ** ((b["m"] - both["m"]) * k)
    for joined in (handover.join(a, b, k), handover.join(b, a, k)):
        assert joined.keys() == both.keys()
        for name, value in both.items():
            np.testing.assert_allclose(joined[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.slow
def test_filtered_by_default_in_tiles_of_two_blocks(monkeypatch):
    this = case((300, 64, 600), "bfloat16", label_smoothing=0.1, spread=8.0)
    small = hopper.small_tiles()
    small = dataclasses.replace(small, sparse=dataclasses.replace(small.sparse, blocks=2))
    monkeypatch.setattr(filtering, "worthwhile", lambda problem: True)
    with hopper.interpreted(tiles=small):
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter="auto")
    assert_no_worse(got, this, slack=3.0)


def test_the_default_filter_follows_tokens_and_classes():
    def epsilon(live: int, v: int) -> float:
        return float(jnp.exp(filtering.log_epsilon("auto", jnp.int32(live), v)))

    assert epsilon(8192, 256_000) == pytest.approx(filtering.EPSILON, rel=1e-5)
    assert epsilon(2048, 256_000) == pytest.approx(filtering.EPSILON / 2, rel=1e-5)
    assert epsilon(8192, 16_000) == pytest.approx(filtering.EPSILON * 2**2.5, rel=1e-5)
    assert epsilon(0, 10**6) == pytest.approx(filtering.LEAST, rel=1e-5)
    assert epsilon(10**6, 1000) == pytest.approx(filtering.MOST, rel=1e-5)
    assert filtering.log_epsilon(2.0**-9, jnp.int32(1), 7) == pytest.approx(np.log(2.0**-9))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"softcap": 4.0, "z_loss": 1e-2}])
@pytest.mark.parametrize(
    ("shape", "layout"),
    # Two groups of tokens, so that dC is carried from one to the next; P of the last columns in dC.
    [((400, 64, 256), (2, 1)), ((200, 512, 1024), (1, 2))],
    ids=["groups", "P within dC"],
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
    computed, whole = [], plan.whole

    def recorded(blocks, live, *args, **options):
        jax.debug.callback(lambda live: computed.append(int(live)), live)
        return whole(blocks, live, *args, **options)

    monkeypatch.setattr(plan, "whole", recorded)
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


@pytest.mark.parametrize("n", [8192, 16_384], ids=["P within dC", "groups"])
def test_fused_products_that_nobody_asked_for_are_not_made(n):
    p = problem(n=n, gradient_filter="fused")
    call = Call(p, None, tiles.choose(p), ctas=132)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((n, p.d), jnp.bfloat16),
            ((p.v, p.d), jnp.bfloat16),
            ((n,), jnp.int32),
            ((n,), jnp.float32),
        )
    ]

    def kernels(argnums) -> list[bool]:
        step = jax.jit(jax.grad(functools.partial(fused.weighted_sum, call), argnums=argnums))
        text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        names = "probabilities", "hidden_gradient", "head_gradient"
        return [f"lsce_{name}" in text for name in names]

    assert kernels((0, 1)) == [True, True, True]
    assert kernels(0) == [True, True, False]
    assert kernels(1) == [True, False, True]
    assert kernels(3) == [False, False, False]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter's products
def test_fused_beyond_its_range_is_infinite_and_not_wrong():
    this = case((20, 64, 256), "bfloat16", spread=300.0)
    with hopper.interpreted():
        got = ours(
            CANDIDATE, this.inputs, **this.options, gradient_filter="fused", return_stats=False
        )
    assert 104 < this.truth.value < np.inf
    assert got.value == np.inf


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_fused_removes_a_token_beyond_its_range(z_loss):
    this = case((40, 64, 256), "bfloat16", weights=True, z_loss=z_loss)
    token = np.flatnonzero(this.inputs.labels >= 0)[0]
    hidden, weights = this.inputs.hidden.copy(), this.inputs.weights.copy()
    hidden[token] *= 100
    weights[token] = 0.0
    this = Case(this.inputs._replace(hidden=hidden, weights=weights), this.options)
    assert this.truth.stats.loss[token] > 200
    options = this.options | {"gradient_filter": "fused", "return_stats": False}
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **options)
    assert_no_worse(got, this)
    assert not np.any(got.grads["hidden"][token])


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


def test_fused_says_why_not():
    def reason(**changes) -> str | None:
        changes = {"gradient_filter": "fused"} | changes
        return hopper.BACKEND.unfused(problem(**changes))

    assert reason() is None
    assert "bias" in reason(has_bias=True)
    assert "statistics" in reason(return_stats=True)
    assert "softcap" in reason(softcap=30.0, label_smoothing=0.1)
    assert "multiples" in reason(v=50_257)
    said = backends.explain(problem(gradient_filter="fused", has_bias=True)).reasons
    assert said["hopper"] == (
        "chosen: the first able; gradients are made afterwards: there is a bias"
    )
    assert backends.explain(problem(gradient_filter="fused")).reasons["hopper"] == (
        "chosen: the first able"
    )
    on_a_cpu = problem(gradient_filter="fused", platform="cpu")
    assert backends.explain(on_a_cpu).reasons["chunked"].endswith("chunked has no other way")


@given(n=st.integers(1, 65_536), d=st.integers(1, 1024), v=st.integers(1, 1200))
def test_no_hidden_size_keeps_gradients_from_being_fused(n, d, v):
    p = problem(n=n, d=8 * d, v=256 * v, gradient_filter="fused", label_smoothing=0.1)
    assert hopper.BACKEND.unfused(p) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(n=56_274, d=4, v=111)
@given(n=st.integers(1, 65_536), d=st.integers(1, 128), v=st.integers(1, 1200))
def test_fused_layouts_fit(n, d, v):
    d, v, tile_c = 64 * d, 256 * v, 256
    groups, own = tiles.fused_layout(n, d, v, tile_c)
    pairs = -(-n // 256)
    assert 1 <= groups <= pairs
    others = v // tile_c - own
    if others:
        assert groups == 1
        # `plan.whole` makes two chunks of them, and the second one's P stays in the first one's dC.
        assert 0 < others <= own
        slots, panels = others * pairs * 2, d // tile_c
        assert -(-slots // panels) * 128 <= own * tile_c
        assert 2 * own * tile_c * pairs * 256 <= tiles.FUSED_WHOLE_BYTES
    else:
        # One group may also have all of P in its own buffer where no part of it fits into dC.
        most = tiles.FUSED_WHOLE_BYTES if groups == 1 else groups * tiles.FUSED_BYTES
        assert groups == pairs or 2 * pairs * 256 * v <= most


def test_fused_layouts():
    assert tiles.fused_layout(8192, 4096, 32_000, 256) == (1, 125)
    # P of the last columns fits into dC of the others, and of one tile more it would not.
    groups, own = tiles.fused_layout(8192, 2304, 256_000, 256)
    assert groups == 1

    def needed(own: int) -> int:
        return -(-(1000 - own) * 64 // 9) * 128

    assert needed(own) <= own * 256
    assert needed(own - 1) > (own - 1) * 256
    assert tiles.fused_layout(32768, 2304, 256_000, 256) == (8, 1000)
    assert tiles.fused_layout(16384, 128, 256_000, 256) == (4, 1000)


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


@pytest.mark.slow
def test_no_tokens():
    def loss(hidden, head):
        labels = jnp.zeros(0, jnp.int32)
        return lsce.linear_cross_entropy(
            hidden, head, labels, label_smoothing=0.1, implementation="hopper"
        )

    with hopper.interpreted():
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            jnp.zeros((0, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
        )
    assert value == 0
    assert grads[0].shape == (0, 64)
    np.testing.assert_array_equal(np.asarray(grads[1], np.float32), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("gradient_filter", "blocks"), [(None, 1), (2.0**-9, 1), (2.0**-9, 2)])
def test_no_races(gradient_filter, blocks):
    # With two stages a tile, so that the second consumer lags by one.
    given = case((130, 128, 260), "bfloat16", label_smoothing=0.1, spread=4.0).inputs
    small = hopper.small_tiles()
    small = dataclasses.replace(small, sparse=dataclasses.replace(small.sparse, blocks=blocks))

    def loss(hidden, head):
        return lsce.linear_cross_entropy(
            hidden, head, given.labels, label_smoothing=0.1, gradient_filter=gradient_filter
        )

    with hopper.interpreted(detect_races=True, tiles=small):
        grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(given.hidden, given.head)
        jax.block_until_ready(grads)
    assert np.isfinite(np.asarray(grads[0], np.float32)).all()
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("epsilon", [None, "auto"], ids=["exact", "filtered"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4, "return_stats": True},
        {"d": 576, "v": 49152, "n": 2048},
        {"d": 4096, "v": 128256, "n": 32768},
        {"d": 1024, "v": 151936, "softcap": 30.0},
    ],
    ids=["gemma2-2b", "all options", "smollm2", "llama3-8b", "qwen3-0.6b, ragged"],
)
def test_lowers_for_cuda_without_a_gpu(options, epsilon):
    p = problem(**options)
    call = Call(p, epsilon, tiles.choose(p), ctas=132)

    def loss(hidden, head, labels):
        return token_losses(call, hidden, head, None, labels)[0].sum()

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(
        bf16(p.n, p.d), bf16(p.v, p.d), jax.ShapeDtypeStruct((p.n,), jnp.int32)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 4


def test_refusals_name_what_is_missing():
    refuses = hopper.BACKEND.refuses
    assert refuses(problem()) is None
    assert "cpu" in refuses(problem(platform="cpu"))
    assert "A100" in refuses(problem(chip="NVIDIA A100-SXM4-80GB"))
    assert "float32" in refuses(problem(head_dtype=np.dtype(np.float32)))
    assert "GH100X" in refuses(problem(chip="NVIDIA GH100X"))
    assert refuses(problem(softcap=1000.0)) is None
    assert "softcap, too little for 1e+06" in refuses(problem(softcap=1e6))
    assert refuses(problem(n=65_536, v=300_000)) is None
    assert "not 1,048,576 × 262,144" in refuses(problem(n=2**20, v=2**18))


@given(n=st.integers(1, 2**22), d=st.integers(1, 1024), v=st.integers(2, 2**21), most=st.booleans())
def test_what_is_not_refused_is_counted_in_32_bits(n, d, v, most):
    """The largest number in `plan.work`, where every pair is active."""
    if most:
        n = min((2**37 - 1) // v, 2**22)
    p = problem(n=n, d=8 * d, v=v)
    assume(hopper.BACKEND.refuses(p) is None)
    sparse = tiles.choose(p).sparse
    blocks, column_tiles = -(-n // 256) * 2, -(-v // sparse.tile_c)
    slots = sparse.slots_for(blocks, column_tiles)
    a_chunk = sparse.width // sparse.tile_c - 1
    assert column_tiles * max(blocks * a_chunk, slots - blocks) < 2**31


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: tiles.ForwardTiles(tile_n=96),
        lambda: tiles.ForwardTiles(tile_n=128, tile_v=256),
        lambda: tiles.ForwardTiles(steps=8),
        lambda: tiles.ForwardTiles(tile_n=64, tile_v=256),
        lambda: tiles.BackwardTiles(tile_c=192),
        lambda: tiles.BackwardTiles(width=1000),
        lambda: tiles.BackwardTiles(tile_c=256, head_c=256, head_d=256),
        lambda: tiles.BackwardTiles(tile_c=128, head_c=256, head_d=64),
        lambda: tiles.BackwardTiles(cluster=4),
    ],
)
def test_tiles_that_cannot_run_cannot_be_built(wrong):
    with pytest.raises(ValueError, match=r"self\.|shared memory"):
        wrong()


@pytest.mark.parametrize("d", [64, 576, 640, 896, 2048, 2304, 3584, 4096, 5120])
def test_heuristic_tiles_fit_and_waste_little(d):
    chosen = tiles.choose(problem(d=d))
    for some in (chosen.sparse, chosen.exact):
        for tile in (some.hidden_d, some.head_d):
            assert -(-d // tile) * tile <= 1.2 * d


def words_of(hit: np.ndarray) -> np.ndarray:
    """Marks words for hit [blocks, V], V a multiple of 128, from the description in marks.py."""
    blocks, v = hit.shape
    words = np.zeros((blocks, 4, v // 32), np.uint32)
    for b, column in zip(*np.nonzero(hit), strict=True):
        group, inside = divmod(int(column), 128)
        j, rest = divmod(inside, 8)
        q, c = divmod(rest, 2)
        words[b, b % 4, group * 4 + q] |= np.uint32(1) << np.uint32(2 * j + c)
    return words.view(np.int32)


@pytest.mark.parametrize(
    ("n", "d", "splits"), [(2048, 576, 2), (8192, 576, 1), (2048, 4096, 1), (1, 64, 4), (0, 64, 4)]
)
def test_few_tokens_have_their_gradient_cut_into_sums(n, d, splits):
    """16 blocks of 3 tiles leave room for a second sum on 132 SMs; 256 tiles need none."""
    assert tiles.heuristic(n, d, 49152, 132).sparse.hidden_splits == splits


@pytest.mark.parametrize(
    ("n", "d", "v", "fewer"),
    [(32768, 4096, 32000, True), (8192, 4096, 32000, False), (32768, 576, 49152, False)],
)
def test_chunks_shrink_where_that_keeps_a_quarter_of_the_memory(n, d, v, fewer):
    """Not where they fit as they are, nor where the gradients alone are more."""
    usual = tiles.BackwardTiles()
    sparse = tiles.heuristic(n, d, v, 132).sparse
    assert (sparse.slots_per_block < usual.slots_per_block) == fewer
    slots = sparse.slots_for(n // 128, -(-v // 128))
    temporary = 2 * 128 * 128 * slots + 2 * sparse.width * d + 4 * n * d
    gradients = 2 * (n + v) * d
    quarter = (4 * n * v + gradients) / 4
    assert (temporary + gradients < quarter) == (n > 8192)


@pytest.mark.parametrize("tiles_", [1, 193])
@pytest.mark.parametrize("blocks", [0, 5, 23, 32, 67, 130])
@pytest.mark.parametrize(("units", "together"), [(2, 2), (2, 1), (66, 66), (66, 22), (66, 11)])
def test_stretches_cover_everything_once_and_evenly(blocks, tiles_, units, together):
    work = stretches.Stretches(blocks, tiles_, units, together)
    cut = work.cut(blocks)
    at_most = 130 // together + 132  # the same for all numbers of blocks, as are the shapes
    unit, i = np.meshgrid(np.arange(units), np.arange(at_most), indexing="ij")
    unit, i = jnp.asarray(unit, jnp.int32), jnp.asarray(i, jnp.int32)
    count, item = work.items(cut, unit)
    slot, block, first, after = (np.asarray(x)[np.asarray(i < count)] for x in item(i))
    assert np.asarray(count).max() <= at_most

    covered = np.zeros((blocks, tiles_), int)
    for b, f, a in zip(block, first, after, strict=True):
        covered[b, f:a] += 1
    np.testing.assert_array_equal(covered, 1)
    parts = np.asarray(work.parts(cut, jnp.arange(blocks, dtype=jnp.int32)))
    for b in range(blocks):
        assert sorted(slot[block == b]) == list(range(parts[b]))
    assert parts.max(initial=0) <= work.slots
    load = np.zeros(units, int)
    np.add.at(load, np.asarray(unit)[np.asarray(i < count)], after - first)
    if cut.rest == 0 or cut.splits == units // cut.rest:
        assert load.max() <= blocks * tiles_ / units + 2 + blocks // together
    else:  # so much memory for partial results is not to be had
        assert blocks < together or together == units or tiles_ == 1


@pytest.mark.parametrize(
    ("d", "tiles_", "together"),
    [(640, 1000, 66), (2304, 1000, 22), (4096, 501, 11), (8192, 501, 11), (4096, 125, 22)],
)
def test_as_many_blocks_at_a_time_as_the_l2_serves(d, tiles_, together):
    assert stretches.Stretches.of(128, 256 * d * 2, tiles_, 66).together == together


def test_units_that_divide_by_nothing_take_a_block_each():
    assert stretches.Stretches.of(128, 256 * 4096 * 2, 1000, 61).together == 61


def test_marks_unpack_to_the_columns_they_mean():
    hit = np.random.default_rng(0).random((3, 384)) < 0.05
    np.testing.assert_array_equal(marks.unpack(jnp.asarray(words_of(hit)), 380), hit[:, :380])


def test_column_bits_join_blocks_and_labels():
    rng = np.random.default_rng(0)
    halves = rng.random((6, 256)) < 0.02  # two marks blocks of 64 tokens a block of 128
    labels = rng.integers(-1, 250, 3 * plan.BLOCK).astype(np.int32)
    bits = plan.column_bits(jnp.asarray(words_of(halves)), 64, jnp.int32(2), 250)
    bits = np.asarray(plan.with_labels(bits, jnp.asarray(labels), jnp.array([False, True, False])))
    expected = halves.reshape(3, 2, 256).any(1)[:, :250]
    expected[2] = False  # beyond the live blocks
    for block, some in enumerate(labels.reshape(3, -1)):
        expected[block, some[some >= 0]] = True
    expected[1] = True  # a flat block
    got = (bits[0][None] >> np.arange(3)[:, None]) & 1
    np.testing.assert_array_equal(got.astype(bool), expected)


def check_work(work: plan.Work, active: np.ndarray, tiles: int, slots: int, group: int):
    """Every active pair is computed once, found by its block and its tile, within the buffers."""
    w = jax.tree.map(np.asarray, work)
    blocks = active.shape[1]
    for c in range(int(w.chunks)):
        first, after = w.first_tile[c], w.first_tile[c + 1]
        assert after - first <= tiles
        computed = {}
        for code in w.items[w.first_item[c] : w.first_item[c + 1]]:
            t, rank = divmod(int(code), blocks)
            assert first <= t < after
            for r in range(rank, rank + group):
                slot = int(w.tile_slot[t]) + r
                assert 0 <= slot < slots
                assert slot not in computed
                computed[slot] = t, int(w.of_tile[t, r])
        wanted = {(t, b) for t, b in np.argwhere(active) if first <= t < after}
        assert wanted <= set(computed.values())
        by_tile = {
            computed[int(w.tile_slot[t]) + r]
            for t in range(first, after)
            for r in range(w.of_tile_count[t])
        }
        by_block = {
            computed[int(w.of_block_slot[b, i])]
            for b in range(blocks)
            for i in range(w.first_of_block[c, b], w.first_of_block[c + 1, b])
        }
        assert by_tile == by_block == wanted
        for b in range(blocks):
            for i in range(w.first_of_block[c, b], w.first_of_block[c + 1, b]):
                assert computed[int(w.of_block_slot[b, i])] == (w.of_block[b, i], b)
    assert not active[w.first_tile[int(w.chunks)] :].any()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_work_covers_the_active_pairs(density, group):
    active = np.random.default_rng(0).random((40, 8)) < density
    active = active[np.argsort(~active.any(1), kind="stable")]
    work = jax.jit(lambda a: plan.work(a, tiles=6, slots=24, group=group))(active)
    check_work(work, active, 6, 24, group)


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(("width", "slots"), [(256, 16), (768, 24), (768, 400), (2048, 24)])
def test_chunks_stay_within_their_bound(density, width, slots):
    sizes = tiles.BackwardTiles(width=width)
    active = np.random.default_rng(0).random((40, 8)) < density
    active = active[np.argsort(~active.any(1), kind="stable")]
    work = plan.work(jnp.asarray(active), tiles=width // 128, slots=slots, group=2)
    most = sizes.most_chunks(40, 8, slots)
    assert work.chunks == most if density == 1 else work.chunks <= most
    assert work.first_tile.shape[0] > most
    assert 1 <= sizes.static_chunks(40, 8, slots) <= most


@pytest.mark.parametrize("together", [1, 2, 3, 9])
@pytest.mark.parametrize("live", [0, 1, 4, 5, 8])
def test_whole_work_covers_the_live_blocks(live, together):
    active = np.broadcast_to(np.arange(8) < -(-live // 2) * 2, (13, 8))
    options = {"slots": 24, "group": 2, "together": together}
    work = jax.jit(lambda n: plan.whole(8, n, 13, **options))(live)
    check_work(work, active, 3, 24, 2)


def test_few_groups_at_a_time_go_through_a_chunk():
    """Five groups of two blocks, so three and two at a time; chunks of two and one tile."""
    work = plan.whole(10, jnp.int32(10), 3, slots=20, group=2, together=4)
    pairs = [divmod(int(code), 10) for code in work.items]
    assert pairs == [
        *[(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (0, 6), (0, 8), (1, 6), (1, 8)],
        *[(2, 0), (2, 2), (2, 4), (2, 6), (2, 8)],
    ]


def test_a_given_order_is_that_of_the_active_columns():
    rng = np.random.default_rng(0)
    hit = rng.random(300) < 0.3
    given = rng.permutation(300).astype(np.int32)
    bits = hit[None].astype(np.uint32)
    columns, _ = plan.columns(jnp.asarray(bits), jnp.asarray(given), 1, 128)
    np.testing.assert_array_equal(np.asarray(columns.order)[: hit.sum()], given[hit[given]])


@pytest.mark.parametrize("blocks", [1, 5, 16])
def test_few_blocks_sort_by_short_keys_in_the_same_order(blocks):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**blocks, (2, 4000)).min(0).astype(np.uint32)
    count = lax.population_count(jnp.asarray(bits))
    long = np.asarray(plan._sharing_key(jnp.asarray(bits)[None], count, blocks))
    long = np.where(bits == 0, 2**32 - 1, long.astype(np.int64))
    short = plan._sharing_ranks(blocks)[bits]
    assert short.dtype == np.uint16
    by_long, by_short = (bits[np.argsort(key, kind="stable")] for key in (long, short))
    np.testing.assert_array_equal(by_long, by_short)


def test_columns_are_permuted_so_that_tiles_are_shared():
    rng = np.random.default_rng(0)
    hit = rng.random((40, 1000)) < np.where(np.arange(1000) % 10 == 0, 0.8, 0.01)
    bits = np.zeros((2, 1000), np.uint32)
    for b in range(40):
        bits[b // 32] |= hit[b].astype(np.uint32) << np.uint32(b % 32)
    columns, pairs = jax.jit(lambda x: plan.columns(x, None, 40, 128))(bits)
    order, pairs = np.asarray(columns.order), np.asarray(pairs)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order[np.asarray(columns.position)], np.arange(1000))
    padded = np.pad(hit[:, order], ((0, 0), (0, 24)))
    np.testing.assert_array_equal(pairs, padded.reshape(40, 8, 128).any(2).T)
    natural = np.pad(hit, ((0, 0), (0, 24))).reshape(40, 8, 128).any(2).sum()
    assert pairs.sum() < 0.6 * natural


def test_tokens_that_need_the_same_columns_are_neighbours():
    labels = np.array([3, -1, 4, 5, -1, 6, 7, 8], np.int32)
    extra = {
        "entropy": np.array([2.9, 0.0, 0.3, 2.1, np.nan, 0.9, np.nan, 99.0], np.float32),
        "prediction": np.array([7, 0, 9, 7, 0, 2, 1, 0], np.int32),
    }
    zeros = jnp.zeros(8)
    hot = Sums(zeros, zeros, jax.tree.map(jnp.asarray, extra), None)
    place = np.asarray(places(jnp.asarray(labels), hot))
    assert np.argsort(place).tolist() == [5, 2, 0, 3, 7, 6, 1, 4]
    assert np.argsort(np.asarray(places(jnp.asarray(labels)))).tolist() == [0, 2, 3, 5, 6, 7, 1, 4]


@pytest.mark.parametrize("v", [2, 1000, 262144])
def test_hot_columns_are_the_most_frequent_labels(v):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(500) < 0.2, -1, (rng.zipf(1.3, 500) - 1) % v).astype(np.int32)
    ids, count = most_frequent(jnp.asarray(labels), v, 64)
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    expected = values[np.lexsort((values, -counts))][:64]
    assert count == len(expected)
    np.testing.assert_array_equal(ids[: len(expected)], expected)
