"""The door of the loss: what it refuses, in which words, labels of any kind, who takes the call."""

import dataclasses
import doctest
import itertools
import sys
import types
from fractions import Fraction
from typing import NamedTuple

import beartype
import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lsce
from lsce import api, backends
from lsce.problem import Problem, of_call

N, D, V = 6, 8, 11


def arguments(**changes):
    rng = np.random.default_rng(0)
    given = {
        "hidden": rng.standard_normal((N, D)).astype(np.float32),
        "head": rng.standard_normal((V, D)).astype(np.float32),
        "labels": np.arange(N, dtype=np.int32),
    }
    return given | changes


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


REFUSED = {
    "hidden of rank 0": ({"hidden": zeros()}, ValueError, r"hidden \(\)"),
    "other leading axes": ({"hidden": zeros(2, 3, D)}, ValueError, r"\(2, 3, 8\).*\(6,\)"),
    "head of rank 1": ({"head": zeros(D)}, ValueError, r"head has shape \(8,\)"),
    "another D": ({"head": zeros(V, 7)}, ValueError, r"D=8.*D=7"),
    "the other layout": ({"head": zeros(D, V)}, ValueError, r"D=11; is head_layout='vd' right"),
    "no classes": ({"head": zeros(0, D)}, ValueError, "V=0"),
    "float labels": ({"labels": zeros(N)}, TypeError, "labels have dtype float32"),
    "boolean labels": ({"labels": zeros(N, dtype=bool)}, TypeError, "labels have dtype bool"),
    "integer hidden": (
        {"hidden": zeros(N, D, dtype=np.int32)},
        TypeError,
        "hidden has dtype int32",
    ),
    "no head": ({"head": None}, TypeError, "head=None; must be an array"),
    "hidden states in words": ({"hidden": "E"}, TypeError, "hidden='E'; must be an array"),
    "no labels": ({"labels": None}, TypeError, "labels"),
    "bias in words": ({"bias": "b"}, TypeError, "bias='b'; must be an array"),
    "integer head": ({"head": zeros(V, D, dtype=np.int8)}, TypeError, "head has dtype int8"),
    "integer bias": ({"bias": zeros(V, dtype=np.int32)}, TypeError, "bias has dtype int32"),
    "bias of another V": ({"bias": zeros(V + 1)}, ValueError, r"\(12,\).*\(11,\)"),
    "weights of another shape": ({"weights": zeros(N, 1)}, ValueError, r"\(6, 1\).*\(6,\)"),
    "integer weights": (
        {"weights": zeros(N, dtype=np.int32)},
        TypeError,
        "weights have dtype int32",
    ),
    "weight below float32": ({"weights": np.full(N, 1e-50)}, ValueError, "weights hold 1e-50"),
    "weight flushed to 0": (
        {"weights": np.full(N, np.float32(1e-40))},
        ValueError,
        r"weights hold 9.99\d+e-41",
    ),
    "weight beyond float32": ({"weights": np.full(N, 1e39)}, ValueError, r"weights hold 1e\+39"),
    "order of another V": ({"vocab_order": zeros(3, dtype=np.int32)}, ValueError, r"\(3,\)"),
    "float order": ({"vocab_order": zeros(V)}, TypeError, "vocab_order has dtype float32"),
    "order without a class": (
        {"vocab_order": np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9])},
        ValueError,
        "vocab_order leaves out 1 of 11 classes, the first of them 10",
    ),
    "smoothing above 1": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing=1.1.*\[0, 1\]"),
    "smoothing below 0": ({"label_smoothing": -0.1}, ValueError, "label_smoothing=-0.1"),
    "smoothing NaN": ({"label_smoothing": float("nan")}, ValueError, "label_smoothing=nan"),
    "smoothing no number": ({"label_smoothing": "0.1"}, TypeError, "label_smoothing='0.1'"),
    "smoothing an array": ({"label_smoothing": zeros(V)}, TypeError, "label_smoothing=array"),
    "smoothing a boolean": ({"label_smoothing": True}, TypeError, "label_smoothing=True"),
    "smoothing complex": ({"label_smoothing": 0.1 + 0j}, TypeError, "label_smoothing="),
    "smoothing nothing": ({"label_smoothing": None}, TypeError, "label_smoothing=None"),
    "softcap no number": ({"softcap": "30"}, TypeError, "softcap='30'"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap=0.0"),
    "softcap infinite": ({"softcap": float("inf")}, ValueError, "softcap=inf"),
    "softcap beyond float32": ({"softcap": 1e39}, ValueError, "softcap=1e\\+39"),
    "scale beyond float32": ({"logit_scale": 1e39}, ValueError, "logit_scale=1e\\+39"),
    "scale 0": ({"logit_scale": 0}, ValueError, "logit_scale=0.0"),
    "z-loss negative": ({"z_loss": -1e-4}, ValueError, "z_loss=-0.0001"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction='avg'"),
    "layout": ({"head_layout": "vh"}, ValueError, "head_layout='vh'"),
    "filter of 1": ({"gradient_filter": 1}, ValueError, "gradient_filter=1.0"),
    "filter a boolean": ({"gradient_filter": True}, TypeError, "gradient_filter=True"),
    "filter's name": ({"gradient_filter": "exact"}, ValueError, "gradient_filter='exact'"),
    "fused with none": (
        {"gradient_filter": "fused", "reduction": "none"},
        ValueError,
        "gradient_filter='fused'.*reduction='none'",
    ),
    "ignore_index float": ({"ignore_index": -100.0}, TypeError, "ignore_index=-100.0"),
    "ignore_index boolean": ({"ignore_index": False}, TypeError, "ignore_index=False"),
    "statistics no boolean": ({"return_stats": "yes"}, TypeError, "return_stats='yes'"),
    "ignore_index far": ({"ignore_index": 2**31 - 1}, ValueError, "ignore_index=2147483647"),
    "implementation": ({"implementation": "cuda"}, ValueError, "implementation='cuda'.*'chunked'"),
    "no name": ({"implementation": ["chunked"]}, ValueError, r"implementation=\['chunked'\]"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_value(changes, error, message):
    with pytest.raises(error, match=message):
        lsce.linear_cross_entropy(**arguments(**changes))
    # The same words without any array: nothing was computed or compiled to find out.
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        if name in ("hidden", "head", "labels") and isinstance(x, np.ndarray)
        else x
        for name, x in arguments(**changes).items()
    }
    with pytest.raises(error, match=message):
        lsce.explain(**shapes)


@pytest.mark.parametrize("name", ["label_smoothing", "logit_scale", "softcap", "z_loss"])
def test_traced_options_are_refused(name):
    with pytest.raises(TypeError, match=f"{name} is traced"):
        jax.jit(lambda x: lsce.linear_cross_entropy(**arguments(**{name: x})))(0.1)


def test_options_may_be_any_python_or_numpy_number():
    expected = lsce.linear_cross_entropy(**arguments(label_smoothing=1.0, softcap=3.0))
    for one, three in (
        (1, np.float32(3)),
        (jnp.bfloat16(1), Fraction(3)),
        (np.int8(1), jnp.int8(3)),
    ):
        got = lsce.linear_cross_entropy(**arguments(label_smoothing=one, softcap=three))
        assert got == expected


@pytest.mark.parametrize(
    "dtype", ["int4", "int8", "uint8", "int16", "uint32", "int32", "int64", "uint64"]
)
@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_labels_of_any_integer_dtype(dtype, wrap):
    expected = lsce.linear_cross_entropy(**arguments())
    assert (
        lsce.linear_cross_entropy(**arguments(labels=wrap(np.arange(N).astype(jnp.dtype(dtype)))))
        == expected
    )


@pytest.mark.parametrize(
    "label", [np.int64(2**32 + 1), np.uint32(2**32 - 100), np.uint8(156), np.int64(-(2**32) - 100)]
)
def test_labels_do_not_wrap_around(label):
    """As int32 or int8 these would be 1, −100, −100 and −100."""
    labels = np.append(np.arange(N - 1), 0).astype(label.dtype)
    labels[-1] = label
    assert np.isnan(lsce.linear_cross_entropy(**arguments(labels=labels)))


def test_labels_may_be_a_list():
    expected = lsce.linear_cross_entropy(**arguments())
    assert lsce.linear_cross_entropy(**arguments(labels=list(range(N)))) == expected


def test_every_array_may_be_a_list():
    given = arguments(bias=np.arange(V) / V, weights=np.linspace(0.5, 1, N), vocab_order=range(V))
    listed = {name: np.asarray(x).tolist() for name, x in given.items()}
    assert lsce.linear_cross_entropy(**listed) == lsce.linear_cross_entropy(
        **arguments(
            bias=np.float32(given["bias"]),
            weights=np.float32(given["weights"]),
            vocab_order=np.arange(V),
        )
    )
    assert lsce.explain(**listed).implementation == "chunked"


def test_ignore_index_may_be_a_class():
    got = lsce.linear_cross_entropy(**arguments(ignore_index=0))
    expected = lsce.linear_cross_entropy(**arguments(labels=np.array([-100, 1, 2, 3, 4, 5])))
    assert got == expected


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_float64_inputs_get_float64_gradients_of_a_float32_loss(implementation):
    with jax.enable_x64(True):
        given = arguments(hidden=np.random.default_rng(1).standard_normal((N, D)))

        def value(hidden):
            return lsce.linear_cross_entropy(
                hidden, given["head"], given["labels"], implementation=implementation
            )

        loss, grad = jax.value_and_grad(value)(jnp.asarray(given["hidden"]))
        assert loss.dtype == np.float32
        assert grad.dtype == np.float64
        single = value(given["hidden"].astype(np.float32))
        np.testing.assert_allclose(loss, single, rtol=1e-6)
        assert np.any(grad)


@pytest.mark.parametrize("mean_of_no_weight", [zeros(N), np.array([1, -1, 0, 0, 0, 0], np.float32)])
def test_the_mean_over_no_weight_is_zero(mean_of_no_weight):
    assert lsce.linear_cross_entropy(**arguments(weights=mean_of_no_weight)) == 0.0


@pytest.mark.parametrize("scale", [1e-37, 1e38], ids=str)
def test_a_mean_does_not_depend_on_the_scale_of_its_weights(scale):
    """Their sum is 0 or ∞ in float32, or near it."""
    given = arguments()
    step = jax.value_and_grad(
        lambda hidden, weights: lsce.linear_cross_entropy(
            hidden, given["head"], given["labels"], weights=weights
        )
    )
    weights = np.linspace(1, 3, N, dtype=np.float32)
    got, expected = (step(jnp.asarray(given["hidden"]), w) for w in (scale * weights, weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
    assert expected[0] > 0.1


def test_weights_that_float32_flushes_to_zero_are_no_perfect_score():
    for dtype in (jnp.float32, jnp.bfloat16):
        weights = jnp.full(N, 1e-40, dtype)
        assert np.isnan(lsce.linear_cross_entropy(**arguments(weights=weights)))
    assert lsce.linear_cross_entropy(**arguments(weights=jnp.zeros(N))) == 0.0


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("of_weights", [False, True], ids=["", "and weights"])
def test_the_logits_of_a_removed_token_may_overflow(implementation, of_weights):
    given = arguments()
    hidden = given["hidden"].copy()
    hidden[2] = 3e38
    weights = np.where(np.arange(N) == 2, 0.0, 1.0).astype(np.float32)

    def value(hidden, head, weights):
        labels = given["labels"]
        options = {"implementation": implementation, "return_stats": True}
        return lsce.linear_cross_entropy(hidden, head, labels, weights=weights, **options)[0]

    step = jax.grad(value, argnums=(0, 1, 2) if of_weights else (0, 1))
    got, expected = (
        step(jnp.asarray(h), given["head"], weights) for h in (hidden, given["hidden"])
    )
    for a, b in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.any(b)
    assert np.isfinite(got[-1]).all()


def test_a_symbolic_batch_is_refused_with_what_to_do():
    (batch,) = jax.export.symbolic_shape("b")
    shapes = (batch, D), (V, D), (batch,)
    dtypes = np.float32, np.float32, np.int32
    given = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match=r"hidden has the symbolic shape \(b, 8\).*fixed number"):
        jax.export.export(jax.jit(lsce.linear_cross_entropy))(*given)


class TestCheckLabels:
    def test_good_labels_pass(self):
        assert lsce.check_labels(np.array([[0, V - 1], [-100, 3]]), V) is None
        assert lsce.check_labels(jnp.array([7, -1]), 8, ignore_index=-1) is None
        assert lsce.check_labels(np.zeros((0,), np.int32), V) is None

    def test_the_first_bad_label_is_shown_with_its_place(self):
        with pytest.raises(
            ValueError, match=r"2 of 6 labels.*\[0, 11\).*the first is 11 at \[0, 2\]"
        ):
            lsce.check_labels(np.array([[0, -100, 11], [-1, 3, 4]]), V)

    def test_a_number_of_classes_that_is_none_is_refused(self):
        for size, error in ((0, ValueError), ("32", TypeError), (np.nan, TypeError)):
            with pytest.raises(error, match=f"vocab_size={size!r}"):
                lsce.check_labels(np.zeros(3, np.int32), size)
        with pytest.raises(TypeError, match="vocab_size=array"):
            lsce.check_labels(V, np.zeros(3, np.int32))
        with pytest.raises(TypeError, match="ignore_index=None"):
            lsce.check_labels(np.zeros(3, np.int32), V, ignore_index=None)

    def test_floats_and_tracers_are_refused(self):
        with pytest.raises(TypeError, match="float64"):
            lsce.check_labels(np.zeros(3), V)
        with pytest.raises(TypeError, match="outside jit"):
            jax.jit(lambda y: lsce.check_labels(y, V))(jnp.arange(3))


class Call(NamedTuple):
    problem: Problem


@dataclasses.dataclass(eq=False)
class Stub:
    """A backend that computes nothing and remembers how it was asked."""

    reason: str | None = None
    calls: list = dataclasses.field(default_factory=list)
    name: str = "stub"
    twice_differentiable: bool = False

    def refuses(self, problem):
        return self.reason

    def call(self, problem):
        return Call(problem)

    def forward(self, call, arrays, *, keep):
        self.calls.append("forward")
        losses = jnp.where(arrays.labels >= 0, 2.0, 0.0)
        return (losses, None), arrays if keep else None

    def backward(self, call, kept, wanted, g, mark):
        self.calls.append("backward")
        return jax.tree.map(jnp.zeros_like, kept._replace(labels=None))


@dataclasses.dataclass(eq=False)
class FusedStub(Stub):
    why_not: str | None = None

    def unfused(self, problem):
        return self.why_not

    def fused(self, call, arrays, weights, wanted, mark):
        self.calls.append("fused")
        (losses, _), _ = super().forward(call, arrays, keep=False)
        return losses, jax.tree.map(jnp.zeros_like, arrays._replace(labels=None))


@pytest.fixture
def install(monkeypatch):
    """Registers a stub as the backend that "auto" asks first."""

    def install(stub: Stub) -> Stub:
        module = types.ModuleType("stub_of_a_backend")
        module.BACKEND = stub
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(backends, "MODULES", {"stub": module.__name__, **backends.MODULES})
        return stub

    return install


class TestChoice:
    def test_auto_takes_the_first_able_backend(self, install):
        stub = install(Stub())
        assert lsce.linear_cross_entropy(**arguments()) == 2.0
        assert stub.calls == ["forward"]
        assert lsce.explain(**arguments()).implementation == "stub"

    def test_auto_passes_one_that_refuses(self, install):
        stub = install(Stub(reason="too hot"))
        assert lsce.linear_cross_entropy(**arguments()) != 2.0
        assert stub.calls == []
        explanation = lsce.explain(**arguments())
        assert explanation.implementation == "chunked"
        assert explanation.reasons["stub"] == "refuses: too hot"

    def test_a_named_backend_that_refuses_is_an_error_with_its_reason(self, install):
        install(Stub(reason="too hot"))
        with pytest.raises(
            ValueError, match="implementation='stub' cannot take this call: too hot"
        ):
            lsce.linear_cross_entropy(**arguments(implementation="stub"))

    def test_one_that_cannot_be_imported_is_passed(self, monkeypatch):
        monkeypatch.setattr(backends, "MODULES", {"gone": "lsce.gone", **backends.MODULES})
        explanation = lsce.explain(**arguments())
        assert explanation.implementation == "chunked"
        assert "No module named 'lsce.gone'" in explanation.reasons["gone"]

    def test_fused_gradients_are_asked_of_a_backend_that_has_them(self, install):
        weights = np.linspace(0.5, 1.5, N, dtype=np.float32)

        def calls(stub, **options):
            install(stub)
            given = arguments(weights=weights, **options)
            hidden = jnp.asarray(given.pop("hidden"))
            total, _ = jax.value_and_grad(lambda h: lsce.linear_cross_entropy(h, **given))(hidden)
            size = weights.sum() if options.get("reduction") == "sum" else 1.0
            assert total == pytest.approx(2.0 * size)
            return set(stub.calls)

        for reduction, choice in itertools.product(("mean", "sum"), ("fused", "fp8")):
            options = {"gradient_filter": choice, "reduction": reduction}
            assert "fused" in calls(FusedStub(), **options)
            assert "backward" not in calls(FusedStub(), **options)
            assert calls(FusedStub(why_not="cold"), **options) == {"forward", "backward"}
            assert calls(Stub(), **options) == {"forward", "backward"}
        assert calls(FusedStub()) == {"forward", "backward"}

    def test_the_explanation_prints_every_backend(self):
        text = str(lsce.explain(**arguments(implementation="reference")))
        lines = {
            line.split()[-len(line.split()) + ("→" in line)]: line for line in text.splitlines()
        }
        assert lines.keys() == backends.MODULES.keys()
        assert lines["reference"].startswith("→")
        assert "by name" in lines["reference"]

    def test_every_registered_backend_has_its_registered_name(self):
        for name in ("chunked", "reference"):
            assert backends.choose(problem(), name).name == name

    def test_the_problem_names_the_device_of_its_arrays(self):
        device = jax.devices()[0]
        assert (problem().platform, problem().chip) == (device.platform, device.device_kind)
        with jax.default_device(device):
            assert problem().platform == device.platform


def problem():
    given = arguments()
    options = lsce.linear_cross_entropy.__kwdefaults__ | {}
    options.pop("implementation")
    return of_call(
        given["hidden"],
        given["head"],
        given["labels"],
        device=api._device(given["hidden"]),
        **options,
    )


class TestVocabularyOrder:
    def test_the_most_active_class_comes_first(self):
        order = lsce.vocabulary_order(jnp.array([1, 5, 0, 5, 2]))
        np.testing.assert_array_equal(order, [1, 3, 4, 0, 2])
        assert order.dtype == np.int32

    def test_mean_logits(self):
        order = lsce.vocabulary_order(jnp.array([-1.0, 0.5, -3.0]))
        np.testing.assert_array_equal(order, [1, 0, 2])

    def test_more_axes_are_refused(self):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            lsce.vocabulary_order(jnp.zeros((2, 3)))


def test_the_annotations_of_the_door_are_true():
    """Valid calls pass their own annotations, and a call with a wrong shape does not."""
    checked = jaxtyping.jaxtyped(lsce.linear_cross_entropy, typechecker=beartype.beartype)
    given = jax.tree.map(jnp.asarray, arguments())
    deep = given | {"hidden": given["hidden"].reshape(2, 3, D), "labels": jnp.ones((2, 3), int)}
    flipped = given | {"head": given["head"].T, "head_layout": "dv"}
    options = {
        "label_smoothing": 0.1,
        "bias": jnp.zeros(V),
        "vocab_order": jnp.arange(V),
        "gradient_filter": "fused",
    }
    for call in (given, deep, flipped, given | options, given | {"weights": jnp.ones(N, bool)}):
        assert np.isfinite(checked(**call))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(**given | {"labels": jnp.zeros(N + 1, int)})


def test_the_example_in_the_docstring():
    result = doctest.testmod(api)
    assert result.attempted >= 3
    assert result.failed == 0
