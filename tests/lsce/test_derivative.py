"""What `lsce.loss` does for every backend: vmap, checkpoint, eager calls, tokens without a say."""

import dataclasses
import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_on_cpu import problem

import lsce
from lsce.backends import Arrays, hopper
from lsce.loss import weighted
from lsce.problem import Problem

pytestmark = pytest.mark.usefixtures("quickly_compiled")

F32 = np.dtype(np.float32)
loss = functools.partial(lsce.linear_cross_entropy, implementation="chunked", label_smoothing=0.1)
truth = functools.partial(loss, implementation="reference")


def temporary_bytes(function, *shapes) -> int:
    """Scratch memory of the compiled value and gradients of hidden and head."""
    return temporary_bytes_of(jax.value_and_grad(function, argnums=(0, 1)), *shapes)


def temporary_bytes_of(function, *shapes) -> int:
    """The same of a function as it is."""
    dtypes = jnp.float32, jnp.float32, jnp.int32
    given = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
    compiled = jax.jit(function).lower(*given).compile()
    return compiled.memory_analysis().temp_size_in_bytes


class TestVmap:
    B, N, D, V = 3, 5, 8, 40

    @pytest.fixture
    def arrays(self):
        rng = np.random.default_rng(0)

        def draw(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        labels = rng.integers(0, self.V, (self.B, self.N))
        labels[0, :2] = -100
        return draw(self.B, self.N, self.D), draw(self.V, self.D), jnp.asarray(labels, jnp.int32)

    def check(self, make, arrays, *, of=(0, 1), atol=1e-6):
        """The gradients of `make(loss)` are those of the reference; returns them."""
        got, expected = (jax.jit(jax.grad(make(x), argnums=of))(*arrays) for x in (loss, truth))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)
            assert np.any(b)

    def test_examples_with_one_head(self, arrays):
        self.check(lambda f: lambda *a: jax.vmap(f, (0, None, 0))(*a).sum(), arrays)

        def along_tokens(f):
            return lambda h, c, y: jax.vmap(f, (1, None, 1))(h, c, y) @ jnp.arange(float(self.N))

        self.check(along_tokens, arrays)

    def test_hidden_states_that_examples_share(self, arrays):
        hidden, head, labels = arrays
        self.check(
            lambda f: lambda h, c, y: jax.vmap(f, (None, None, 0))(h, c, y).sum(),
            (hidden[0], head, labels),
        )

    def test_under_scan_and_checkpoint(self, arrays):
        def scanned(f):
            each = jax.checkpoint(jax.vmap(f, (0, None, 0)))

            def total(hidden, head, labels):
                def step(sum_, h):
                    return (sum_ + each(h, head, labels).sum(), None)

                return jax.lax.scan(step, 0.0, jnp.stack([hidden, 2 * hidden]))[0]

            return total

        self.check(scanned, arrays)

    def test_twice(self, arrays):
        hidden, head, labels = (x[None] if i != 1 else x for i, x in enumerate(arrays))

        def twice(f):
            return jax.vmap(jax.vmap(f, (0, None, 0)), (0, None, 0))

        self.check(lambda f: lambda *a: twice(f)(*a).sum(), (hidden, head, labels))

    def test_a_head_of_each_example(self, arrays):
        hidden, head, labels = arrays
        heads = jnp.stack([head, 2 * head, -head])
        self.check(lambda f: lambda *a: jax.vmap(f)(*a).sum(), (hidden, heads, labels))

    def test_the_gradients_of_each_example(self, arrays):
        """What vmap(grad) asks for: nothing is summed over the examples."""

        def each(f):
            return jax.jit(jax.vmap(jax.grad(f, argnums=(0, 1)), (0, None, 0)))(*arrays)

        got, expected = each(loss), each(truth)
        assert got[1].shape == (self.B, self.V, self.D)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("axes", [(0, None, 0), (None, None, 0), (None, 0, None)])
    def test_second_derivatives_of_what_examples_share(self, arrays, axes):
        """A batched custom_vjp would count the cotangent of a shared head once an example."""
        hidden, head, labels = arrays
        heads = jnp.stack([head, 2 * head, -head])
        given = [
            x if axis == 0 else one
            for x, one, axis in zip(
                (hidden, heads, labels), (hidden[0], head, labels[0]), axes, strict=True
            )
        ]

        def penalty(f):
            return lambda *a: sum(jnp.sum(g**2) for g in jax.grad(f, argnums=(0, 1))(*a))

        self.check(lambda f: lambda *a: jax.vmap(penalty(f), axes)(*a).sum(), given, atol=1e-4)

    def test_weights_statistics_and_reductions(self, arrays):
        hidden, head, labels = arrays
        weights = jnp.linspace(0.5, 2.0, self.B * self.N).reshape(self.B, self.N)
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "return_stats": True}

            def call(h, y, w, options=options):
                return loss(h, head, y, weights=w, **options)

            got = jax.jit(jax.vmap(call))(hidden, labels, weights)
            alone = [jax.jit(call)(*x) for x in zip(hidden, labels, weights, strict=True)]
            expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected
            )

    def test_memory_is_that_of_so_many_tokens(self):
        def shared(h, c, y):
            return jax.vmap(loss, (0, None, 0))(h, c, y).mean()

        flat = temporary_bytes(loss, (2048, 64), (65536, 64), (2048,))
        batched = temporary_bytes(shared, (64, 32, 64), (65536, 64), (64, 32))
        assert batched < 1.5 * flat

    def test_memory_of_the_gradients_of_each_example(self):
        """Under a head that examples share and nobody differentiates."""
        flat = temporary_bytes_of(jax.grad(loss), (2048, 64), (65536, 64), (2048,))
        each = jax.vmap(jax.grad(loss), (0, None, 0))
        assert temporary_bytes_of(each, (64, 32, 64), (65536, 64), (64, 32)) < 2 * flat

    @pytest.mark.parametrize("implementation", ["chunked", "reference"])
    def test_an_invalid_label_marks_its_own_example_and_the_head(self, arrays, implementation):
        hidden, head, labels = arrays
        labels = labels.at[1, 2].set(self.V)

        def total(hidden, head):
            one = functools.partial(loss, implementation=implementation)
            return jax.vmap(one, (0, None, 0))(hidden, head, labels).sum()

        d_hidden, d_head = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head)
        np.testing.assert_array_equal(np.isnan(d_hidden).all((1, 2)), [False, True, False])
        assert np.isfinite(d_hidden[::2]).all()
        assert np.abs(d_hidden[::2]).max((1, 2)).min() > 1e-3
        assert np.isnan(d_head).all()


@pytest.mark.slow
def test_examples_with_one_head_are_more_tokens_to_hopper_too():
    """Lowered only: its kernels see 4 × 2,048 tokens at once, and no gradient of a head is made
    for each example."""
    p = problem(n=2048, label_smoothing=0.1)

    def total(hidden, head, labels):
        def one(hidden, labels):
            arrays = Arrays(hidden, head, labels)
            return weighted(hopper.BACKEND, p, arrays, ones, summed=True)[0]

        return jax.vmap(one)(hidden, labels).sum()

    ones = jnp.ones(p.n, jnp.float32)
    shapes = ((4, p.n, p.d), jnp.bfloat16), ((p.v, p.d), jnp.bfloat16), ((4, p.n), jnp.int32)
    given = [jax.ShapeDtypeStruct(*x) for x in shapes]
    traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(*given)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 4
    assert f"tensor<{4 * p.n}x{p.d}xbf16>" in text
    assert f"tensor<4x{p.v}x{p.d}x" not in text


@pytest.mark.parametrize(
    "policy", ["dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"]
)
def test_no_policy_of_checkpoint_saves_the_logits(policy):
    policy = getattr(jax.checkpoint_policies, policy)
    shapes = (2048, 64), (65536, 64), (2048,)
    kept = temporary_bytes(jax.checkpoint(loss, policy=policy), *shapes)
    assert kept < 1.5 * temporary_bytes(loss, *shapes)
    assert kept < 2048 * 65536 * 4 / 8


@pytest.mark.parametrize(
    ("call", "heads"),
    [(jax.grad(loss, argnums=(0, 1)), ()), (jax.vmap(loss, (None, 0, None)), (2,))],
    ids=["gradients", "a head of each example"],
)
def test_eager_calls_are_compiled_once(caplog, call, heads):
    hidden, head, labels = jnp.ones((6, 8)), jnp.ones((*heads, 11, 8)), jnp.arange(6)

    def compilations(n: int) -> int:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for _ in range(n):
                call(hidden, head, labels)
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    assert compilations(1) > 0
    assert compilations(2) == 0


class Call(NamedTuple):
    problem: Problem


@dataclasses.dataclass(frozen=True)
class Counting:
    """A backend that takes for the loss of a token how many tokens it was to compute."""

    name: str = "counting"
    twice_differentiable: bool = False

    def refuses(self, problem):
        return None

    def call(self, problem):
        return Call(problem)

    def forward(self, call, arrays, *, keep):
        live = arrays.labels >= 0
        stats = None
        if call.problem.return_stats:
            zeros = jnp.zeros(live.shape, jnp.float32)
            stats = lsce.TokenStats(*[zeros] * len(lsce.TokenStats._fields))
        return (jnp.where(live, jnp.sum(live, dtype=jnp.float32), 0.0), stats), arrays

    def backward(self, call, kept, wanted, g, mark):
        return Arrays(jnp.zeros_like(kept.hidden), jnp.ones_like(kept.head) * mark)


@pytest.mark.parametrize("backend", [Counting(), Counting(twice_differentiable=True)])
@pytest.mark.parametrize("stats", [False, True], ids=["", "statistics"])
@pytest.mark.parametrize("of_weights", [False, True], ids=["", "of weights"])
def test_tokens_of_weight_zero_are_computed_where_somebody_looks_at_them(
    backend, stats, of_weights
):
    n, d, v = 20, 4, 7
    problem = Problem(n, d, v, F32, F32, "cpu", "cpu", return_stats=stats)
    hidden, weights = jnp.ones((n, d)), jnp.where(jnp.arange(n) < 3, 1.0, 0.0)

    def total(hidden, weights):
        arrays = Arrays(hidden, jnp.ones((v, d)), jnp.zeros(n, jnp.int32))
        return weighted(backend, problem, arrays, weights, summed=True)[0]

    value, grads = jax.value_and_grad(total, (0, 1) if of_weights else 0)(hidden, weights)
    everyone = backend.twice_differentiable or stats or of_weights
    assert value == 3 * (n if everyone else 3)
    if of_weights:
        np.testing.assert_array_equal(grads[1], np.full(n, float(n)))


@pytest.mark.parametrize("invalid", [False, True])
def test_the_mark_of_an_invalid_label_reaches_every_gradient(invalid):
    problem = Problem(4, 2, 3, F32, F32, "cpu", "cpu")
    labels = jnp.array([0, 1, -1, -1])
    weights = jnp.array([0.5, 0.5, 0.0, jnp.nan if invalid else 0.0])

    def total(hidden, head):
        arrays = Arrays(hidden, head, labels)
        return weighted(Counting(), problem, arrays, weights, summed=True)[0]

    grads = jax.grad(total, argnums=(0, 1))(jnp.ones((4, 2)), jnp.ones((3, 2)))
    assert all(np.isnan(grad).all() == invalid for grad in grads)


@pytest.mark.parametrize("of", ["hidden", "factor"])
def test_second_derivatives_that_a_backend_lacks_are_refused(of):
    """Among them that of a gradient by a factor of the loss."""
    problem = Problem(4, 2, 3, F32, F32, "cpu", "cpu")

    def first(hidden, factor):
        def total(hidden):
            arrays = Arrays(hidden, jnp.ones((3, 2)), jnp.zeros(4, jnp.int32))
            return factor * weighted(Counting(), problem, arrays, jnp.ones(4), summed=True)[0]

        return jax.grad(total)(hidden).sum()

    with pytest.raises(TypeError, match="implementation='counting' has no second derivatives"):
        jax.grad(first, argnums=("hidden", "factor").index(of))(jnp.ones((4, 2)), 2.0)
