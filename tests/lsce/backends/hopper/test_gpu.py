"""The Hopper kernels on a real GPU: every mode and option, large and tiny shapes, memory.

`make test-gpu`; about 100 seconds, of which most is compilation. Every result is computed twice and
must be the same to the last bit. Each check also runs at small shapes on the chunked backend, on
any machine: what the kernels are held against is itself tested.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    Case,
    Inputs,
    Result,
    Shape,
    assert_no_worse,
    assert_stats,
    case,
    cotangent,
    truth,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from low_check import emulated
from tail_check import assert_terms

import lsce
from lsce.backends import hopper
from lsce.backends.hopper import eight_bits, tiles
from lsce.problem import Problem
from lsce.sparse import filter as filtering

BF16 = np.dtype(jnp.bfloat16)
DEVICE = jax.devices()[0]
REFUSAL = hopper.BACKEND.refuses(
    Problem(64, 64, 64, BF16, BF16, platform=DEVICE.platform, chip=DEVICE.device_kind)
)
GPU = (pytest.mark.gpu, pytest.mark.skipif(REFUSAL is not None, reason=f"hopper {REFUSAL}"))

MB = 2**20
EPSILON = filtering.FITTED
"""What "auto" took once for 8,192 tokens of Gemma's: of small problems, too, it leaves out some."""


class Subject(NamedTuple):
    """The backend under test and the shapes (N, D, V) to test it at."""

    implementation: str
    small: Shape
    other: Shape
    even: Shape
    """Multiples of the tiles, which gradients made in the forward need."""
    large: Shape


SUBJECTS = [
    pytest.param(
        # N·V of `large` passes 2^31, its tiles of P hold two blocks, and of nothing there is a
        # whole number of tiles or chunks.
        Subject("hopper", (300, 200, 5003), (127, 72, 1021), (600, 512, 5120), (16500, 64, 200003)),
        marks=GPU,
        id="hopper",
    ),
    pytest.param(
        Subject("chunked", (127, 72, 257), (33, 24, 201), (64, 16, 256), (300, 16, 3001)),
        id="rehearsal",
    ),
]


@pytest.fixture(params=SUBJECTS)
def subject(request) -> Subject:
    return request.param


@functools.cache
def step(implementation: str, **options: Any) -> Any:
    """(arrays, frozen, labels) → the loss and the gradients of `arrays`; compiled once a shape."""

    def objective(arrays, frozen, labels):
        x = arrays | frozen
        got = lsce.linear_cross_entropy(
            x["hidden"],
            x["head"],
            labels,
            bias=x.get("bias"),
            weights=x.get("weights"),
            implementation=implementation,
            **options,
        )
        value, stats = got if options.get("return_stats") else (got, None)
        each = options.get("reduction") == "none"
        return jnp.vdot(value, cotangent(len(labels))) if each else value, (value, stats)

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def run(
    implementation: str, given: Inputs, *, frozen: tuple[str, ...] = (), **options: Any
) -> Result:
    """Value, gradients of what is not frozen, and statistics; the same bits twice."""
    arrays = jax.tree.map(jnp.asarray, given.differentiable())
    held = {name: arrays.pop(name) for name in frozen}
    once, again = (
        jax.tree.map(np.asarray, step(implementation, **options)(arrays, held, given.labels))
        for _ in range(2)
    )
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        assert a.tobytes() == b.tobytes(), "differs from run to run"
    (_, (value, stats)), grads = once
    return Result(value, grads, stats)


def poisoned(given: Inputs) -> Inputs:
    """With NaN in the hidden rows of ignored tokens."""
    ignored = given.labels < 0
    assert ignored.any()
    return given._replace(hidden=np.where(ignored[:, None], np.nan, given.hidden).astype(BF16))


def relative_error(got: np.ndarray, true: np.ndarray) -> float:
    true = true.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - true) / np.linalg.norm(true))


def memory_of(function: Any, shape: Shape) -> tuple[float, float]:
    """MB of temporaries and of outputs of a compiled function of (hidden, head, labels)."""
    n, d, v = shape
    compiled = (
        jax.jit(function)
        .lower(
            jax.ShapeDtypeStruct((n, d), BF16),
            jax.ShapeDtypeStruct((v, d), BF16),
            jax.ShapeDtypeStruct((n,), np.int32),
        )
        .compile()
    )
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes / MB, analysis.output_size_in_bytes / MB


# Every option


ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "bias": True, "weights": True}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("small", {"softcap": 3.0, "logit_scale": 0.7}),
        ("other", {"logit_scale": 1.3, "reduction": "none", "head_layout": "dv"}),
    ],
    ids=["softcap, vd, mean", "dv, none"],
)
def test_exact_with_all_options(subject, shape, options):
    this = case(getattr(subject, shape), "bfloat16", **ALL_OPTIONS, **options)
    given = poisoned(this.inputs)
    got = run(
        subject.implementation, given, **this.options, gradient_filter=None, return_stats=True
    )
    assert_no_worse(got, this)
    assert_stats(got, this)
    assert not np.any(got.grads["hidden"][given.labels < 0])


def test_filtered_with_all_options(subject):
    options = {"softcap": 15.0, "logit_scale": 1.1, "head_layout": "dv"}
    this = case(subject.small, "bfloat16", spread=5.0, **ALL_OPTIONS, **options)
    got = run(
        subject.implementation,
        poisoned(this.inputs),
        **this.options,
        gradient_filter=EPSILON,
        return_stats=True,
    )
    assert_no_worse(got, this, slack=3.0)
    assert_stats(got, this, filtered=True)


FILTERED = {"label_smoothing": 0.1, "gradient_filter": EPSILON}


@pytest.mark.parametrize(
    ("shape", "spread"), [("small", 0.1), ("small", 1.0), ("small", 5.0), ("even", 5.0)]
)
def test_filtered(subject, shape, spread):
    """From flat, where no class passes the filter and all are kept, to peaked."""
    this = case(getattr(subject, shape), "bfloat16", spread=spread, label_smoothing=0.1)
    got = run(subject.implementation, poisoned(this.inputs), **FILTERED)
    assert_no_worse(got, this, slack=3.0)
    if spread == 5.0:  # the other gradients are the smoothing's alone, and every one of them counts
        assert np.count_nonzero(got.grads["head"]) > 0.9 * got.grads["head"].size


@pytest.mark.gpu
@GPU[1]
@pytest.mark.parametrize("options", [{}, {"softcap": 15.0}], ids=["", "softcap"])
@pytest.mark.parametrize(
    ("shape", "spread"), [((300, 200, 5003), 0.1), ((300, 200, 5003), 2.0), ((600, 512, 5120), 5.0)]
)
def test_the_rest_in_8_bits(shape, spread, options, monkeypatch):
    """Where little is kept in 16 bits, as near to the truth as twice the naive loss."""
    monkeypatch.setattr(filtering, "tail_worthwhile", lambda problem: True)
    monkeypatch.setattr(filtering, "log_epsilon", lambda *_: jnp.float32(np.log(2.0**-4)))
    step.cache_clear()
    this = case(shape, "bfloat16", spread=spread, **ALL_OPTIONS, **options)
    given = poisoned(this.inputs)
    got = run("hopper", given, **this.options, gradient_filter="fp8", return_stats=True)
    step.cache_clear()
    assert_no_worse(got, this)
    assert_stats(got, this, filtered=True)
    # Of classes that nobody has for a label next to all of dC is the tail's.
    others = ~np.isin(np.arange(shape[2]), this.inputs.labels)
    true, found = this.truth.grads["head"][others], got.grads["head"][others]
    assert np.linalg.norm(found - true) < 0.1 * np.linalg.norm(true)


@pytest.mark.gpu
@GPU[1]
@pytest.mark.parametrize("shape", [(300, 200, 5003), (2000, 512, 20_000)])
def test_auto_in_8_bits_where_tokens_are_flat(shape, monkeypatch):
    """All but the labels' pairs, which a filter would keep: other bits, and no worse."""
    monkeypatch.setattr(filtering, "worthwhile", lambda problem: True)
    monkeypatch.setattr(filtering, "look_worthwhile", lambda *_: True)
    step.cache_clear()
    this = case(shape, "bfloat16", spread=0.1, label_smoothing=0.1, z_loss=1e-2, weights=True)
    given = poisoned(this.inputs)
    got, whole = (
        run("hopper", given, **this.options, gradient_filter=choice, return_stats=True)
        for choice in ("auto", EPSILON)
    )
    step.cache_clear()
    assert got.value == whole.value
    assert all(np.any(got.grads[name] != whole.grads[name]) for name in ("hidden", "head"))
    assert_no_worse(got, this)
    assert_stats(got, this, filtered=True)
    others = ~np.isin(np.arange(shape[2]), this.inputs.labels)
    true, found = this.truth.grads["head"][others], got.grads["head"][others]
    assert np.linalg.norm(found - true) < 0.1 * np.linalg.norm(true)


@pytest.mark.gpu
@GPU[1]
@pytest.mark.parametrize("cap", [None, 9.0])
def test_terms_of_the_tail_in_both_orders(cap):
    """The bits that the formula makes of the 8-bit operands; the sum keeps about 14 of its own."""
    assert_terms(tiles.Tiles().tail, cap, most=0.02)


@pytest.mark.gpu
@GPU[1]
@pytest.mark.parametrize(
    ("shape", "spread", "gradient_filter"),
    [
        ((300, 200, 5003), 0.5, None),
        ((300, 200, 5003), 3.0, EPSILON),
        ((600, 512, 9000), 5.0, "fp8"),
    ],
)
def test_small_logits_in_8_bits(shape, spread, gradient_filter, monkeypatch):
    """What they make of each token's loss, and nothing else: an accumulator of 14 bits aside."""
    for name in ("low_forward_worthwhile", "tail_worthwhile"):
        monkeypatch.setattr(filtering, name, lambda problem: True)
    monkeypatch.setattr(eight_bits, "LARGE", 2.0**-4)
    step.cache_clear()
    options = {"bias": True, "weights": True, "z_loss": 1e-3, "logit_scale": 0.7}
    this = case(shape, "bfloat16", spread=spread, reduction="none", label_smoothing=0.1, **options)
    given = poisoned(this.inputs)
    got = run("hopper", given, **this.options, gradient_filter=gradient_filter, precision="fp8")
    step.cache_clear()
    losses, share = emulated(this, 2.0**-4)
    assert share < 0.9
    off = np.linalg.norm(losses - this.truth.value)
    assert off > 1e-4
    # An accumulator of 14 bits puts them 5e-5 to 8e-5 nats off on an H200.
    assert np.linalg.norm(got.value - losses) < 0.25 * off + 1.5e-4 * np.sqrt(len(losses))
    for name, true in this.truth.grads.items():
        assert relative_error(got.grads[name], true) < 0.04, name


def test_all_ignored(subject):
    given = case(subject.small, "bfloat16", spread=5.0, label_smoothing=0.1).inputs
    given = poisoned(given._replace(labels=np.full_like(given.labels, -100)))
    got = run(subject.implementation, given, **FILTERED)
    assert got.value == 0.0
    assert not any(np.any(grad) for grad in got.grads.values())  # NaN counts as True


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_frozen(subject, frozen):
    given = case(subject.small, "bfloat16", spread=5.0, label_smoothing=0.1).inputs
    both = run(subject.implementation, given, **FILTERED)
    alone = run(subject.implementation, given, frozen=(frozen,), **FILTERED)
    assert alone.grads.keys() == {"hidden", "head"} - {frozen}
    assert alone.value == both.value
    for name, grad in alone.grads.items():
        assert relative_error(grad, both.grads[name]) < 1e-3


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize(
    ("limits", "layout"),
    [
        ({}, (1, 20)),
        ({"FUSED_BYTES": 1}, (1, 12)),
        ({"FUSED_BYTES": 1, "FUSED_WHOLE_BYTES": 1}, (3, 20)),
    ],
    ids=["whole", "P within dC", "groups"],
)
def test_fused(subject, limits, layout, weights, monkeypatch):
    """With weights the losses come from a pass of their own, as their gradient is asked for."""
    for name, most in limits.items():
        monkeypatch.setattr(tiles, name, most)
    step.cache_clear()
    if subject.implementation == "hopper":
        assert_fused(subject.even)
        assert tiles.fused_layout(*subject.even, 256) == layout
    this = case(subject.even, "bfloat16", weights=weights, label_smoothing=0.1, z_loss=1e-2)
    got = run(
        subject.implementation, poisoned(this.inputs), **this.options, gradient_filter="fused"
    )
    step.cache_clear()
    assert_no_worse(got, this)


@pytest.mark.parametrize("limits", [{}, {"FUSED_BYTES": 1, "FUSED_WHOLE_BYTES": 1}])
def test_fused_with_losses_of_any_size(subject, limits, monkeypatch):
    """Of 100s and 1,000s of nats, far above what is known of them before the forward."""
    for name, most in limits.items():
        monkeypatch.setattr(tiles, name, most)
    step.cache_clear()
    if subject.implementation == "hopper":
        assert_fused(subject.even)
    given = case(subject.even, "bfloat16").inputs
    tokens = np.flatnonzero(given.labels >= 0)[-3:]
    hidden = given.hidden.copy()
    hidden[tokens] *= np.array([[60.0], [150.0], [1000.0]], BF16)
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "reduction": "sum"}
    this = Case(given._replace(hidden=hidden), options)
    assert this.truth.stats is not None
    assert np.all(this.truth.stats.loss[tokens] > (60, 150, 1000))
    got = run(subject.implementation, this.inputs, **options, gradient_filter="fused")
    step.cache_clear()
    assert_no_worse(got, this)
    for token in tokens:
        true, found = this.truth.grads["hidden"][token], got.grads["hidden"][token]
        assert relative_error(found, true) < 0.02


@pytest.mark.gpu
@GPU[1]
@pytest.mark.parametrize(
    "shape", [(500, 512, 5120), (200, 1280, 25_600), (200, 512, 5003), (600, 512, 5003)]
)
def test_few_tokens_are_fused_by_fp8(shape):
    """P in eighths where dC will be, in rows that it fills and that it does not, and in one piece;
    without a dC by the other way."""
    assert_fused(shape, "fp8")
    this = case(shape, "bfloat16", spread=3.0, label_smoothing=0.1, z_loss=1e-2)
    given = poisoned(this.inputs)
    got = run("hopper", given, **this.options, gradient_filter="fp8")
    assert_no_worse(got, this)
    fused = run("hopper", given, **this.options, gradient_filter="fused")
    frozen = run("hopper", given, frozen=("head",), **this.options, gradient_filter="fp8")
    for name, grad in got.grads.items():
        assert relative_error(grad, fused.grads[name]) < 1e-3
    assert relative_error(frozen.grads["hidden"], got.grads["hidden"]) < 0.01


def assert_fused(shape: Shape, gradient_filter: Any = "fused") -> None:
    """The kernels are not those of exact mode, which would hide every mistake of this one."""
    chip = {"platform": DEVICE.platform, "chip": DEVICE.device_kind}
    options = {"label_smoothing": 0.1, "gradient_filter": gradient_filter}
    assert hopper.BACKEND.unfused(Problem(*shape, BF16, BF16, **chip, **options)) is None


@pytest.mark.parametrize("gradient_filter", [None, EPSILON, "fused"])
def test_the_derivative_of_a_scan(subject, gradient_filter):
    """Which gives its kernels slices and keeps what they write: four parts, against the truth."""
    n, d, v = subject.even
    if (subject.implementation, gradient_filter) == ("hopper", "fused"):
        assert_fused((n // 4, d, v))
    this = case(subject.even, "bfloat16", spread=5.0, label_smoothing=0.1, reduction="sum")
    options = {**this.options, "gradient_filter": gradient_filter}

    def total(arrays, labels):
        def add(so_far, part):
            hidden, labels = part
            loss = lsce.linear_cross_entropy(
                hidden, arrays["head"], labels, implementation=subject.implementation, **options
            )
            return so_far + loss, None

        parts = arrays["hidden"].reshape(4, n // 4, d), labels.reshape(4, n // 4)
        return jax.lax.scan(add, jnp.float32(0.0), parts)[0]

    arrays = jax.tree.map(jnp.asarray, this.inputs.differentiable())
    value, grads = jax.jit(jax.value_and_grad(total))(arrays, jnp.asarray(this.inputs.labels))
    got = Result(np.asarray(value), jax.tree.map(np.asarray, grads), None)
    assert_no_worse(got, this, slack=3.0)


@pytest.mark.parametrize("gradient_filter", [None, EPSILON, "fused", "fp8"])
def test_on_a_mesh(subject, gradient_filter):
    """Half of the tokens on each of two devices, against the truth."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    if (subject.implementation, gradient_filter) == ("hopper", "fused"):
        n, d, v = subject.even
        assert_fused((n // 2, d, v))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    this = case(subject.even, "bfloat16", spread=5.0, label_smoothing=0.1)
    specs = {"hidden": P("data"), "head": P()}
    arrays = this.inputs.differentiable()
    arrays = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()
    }
    labels = jax.device_put(this.inputs.labels, NamedSharding(mesh, P("data")))
    options = {**this.options, "gradient_filter": gradient_filter}
    (_, (value, _)), grads = jax.tree.map(
        np.asarray, step(subject.implementation, **options)(arrays, {}, labels)
    )
    assert_no_worse(Result(value, grads, None), this, slack=3.0)


# Extreme shapes


def test_one_token_two_classes(subject):
    this = case((1, 64, 2), "bfloat16", label_smoothing=0.1)
    got = run(subject.implementation, this.inputs, **this.options, return_stats=True)
    assert_no_worse(got, this)
    assert_stats(got, this)


@functools.cache
def large_reference(shape: Shape) -> tuple[Inputs, np.ndarray, Result, Result]:
    """Inputs; some tokens, their result in float64; and everything in float32 by `chunked`."""
    given = case(shape, "bfloat16", spread=5.0).inputs
    some = np.append(np.flatnonzero(given.labels >= 0)[:: shape[0] // 40], shape[0] - 1)
    few = given._replace(hidden=given.hidden[some], labels=given.labels[some])
    exact = truth(few, label_smoothing=0.1, reduction="sum")
    wide = given._replace(
        hidden=given.hidden.astype(np.float32), head=given.head.astype(np.float32)
    )
    whole = run("chunked", wide, label_smoothing=0.1, reduction="sum", gradient_filter=None)
    return given, some, exact, whole


@pytest.mark.parametrize(
    ("gradient_filter", "most"),
    [(None, 0.01), (EPSILON, 0.015), ("auto", 0.015), ("hidden", 0.015)],
    ids=str,
)
def test_large(subject, gradient_filter, most):
    given, some, exact, whole = large_reference(subject.large)
    got = run(
        subject.implementation,
        given,
        label_smoothing=0.1,
        reduction="sum",
        gradient_filter=gradient_filter,
        return_stats=True,
    )
    few = got._replace(stats=jax.tree.map(lambda x: x[some], got.stats))
    assert exact.stats is not None
    for name in ("loss", "lse", "target_logit", "mean_logit", "entropy"):
        np.testing.assert_allclose(
            getattr(few.stats, name), getattr(exact.stats, name), rtol=1e-4, atol=1e-4
        )
    np.testing.assert_array_equal(few.stats.prediction, exact.stats.prediction)
    np.testing.assert_allclose(got.value, whole.value, rtol=1e-5)
    assert relative_error(got.grads["hidden"][some], exact.grads["hidden"]) < most
    assert relative_error(whole.grads["hidden"][some], exact.grads["hidden"]) < 1e-4
    hit = np.isin(np.arange(len(given.head)), given.labels)
    for rows in (hit, ~hit):
        assert relative_error(got.grads["head"][rows], whole.grads["head"][rows]) < 0.01


# Memory


PAPER: Shape = (8192, 2304, 256_000)
"""Gemma 2 2B, as in the paper's tables."""


def loss(implementation: str, gradient_filter: Any = "auto") -> Any:
    return functools.partial(
        lsce.linear_cross_entropy,
        label_smoothing=0.1,
        gradient_filter=gradient_filter,
        implementation=implementation,
    )


@pytest.mark.gpu
@GPU[1]
def test_the_forward_needs_a_megabyte():
    assert sum(memory_of(loss("hopper"), PAPER)) <= 1.1


@pytest.mark.gpu
@GPU[1]
@pytest.mark.parametrize(
    ("gradient_filter", "most"), [("auto", 1400), (None, 1500), ("hidden", 1500), ("fp8", 1600)]
)
def test_the_gradients_need_little_beyond_their_own_size(gradient_filter, most):
    gradients = jax.value_and_grad(loss("hopper", gradient_filter), argnums=(0, 1))
    n, d, v = PAPER
    temporary, output = memory_of(gradients, PAPER)
    assert output >= (n + v) * d * BF16.itemsize / MB
    assert temporary + output <= most


def test_logits_would_be_seen_in_these_figures():
    n, _, v = shape = (8192, 64, 32_768)
    logits = n * v * 4 / MB
    assert sum(memory_of(loss("reference"), shape)) >= logits
    assert sum(memory_of(loss("chunked"), shape)) < logits


# What the compiler makes of them


@pytest.mark.gpu
@GPU[1]
@pytest.mark.parametrize(
    ("v", "gradient_filter"),
    # At 151,936 the last tile holds columns that are no classes.
    [
        *((256_000, choice) for choice in (None, "auto", "fused", "hidden", "fp8")),
        *((151_936, choice) for choice in (None, "auto", "fp8")),
    ],
)
def test_no_product_waits_for_the_one_before(v, gradient_filter, monkeypatch, capfd):
    """ptxas reports it where it cannot keep two in flight; nothing else tells."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    gradients = jax.value_and_grad(loss("hopper", gradient_filter), argnums=(0, 1))
    memory_of(gradients, (1920, 1024, v))  # an N of its own: Mosaic keeps what it has compiled
    report = "".join(capfd.readouterr())
    assert "lsce_forward" in report
    assert "serialized" not in report
