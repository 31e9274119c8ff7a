"""The one derivative: what every backend's forward and backward pass have in common.

    Σ_n w_n·L_n, or each w_n·L_n;    d/dw_n = L_n,    d/d(E, C, b) = backward(g) with g_n = w_n·ḡ_n

where ḡ is the cotangent. Written here, once: which inputs are frozen, the tokens that have no say,
the mark of an invalid label, the axes of a `shard_map` that results vary over, `jit` around an
eager call, and what `vmap` means. A backend that JAX differentiates itself (`reference`) passes by.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import batching
from jaxtyping import Array, Float

from lsce import formula
from lsce.backends import Arrays, Differentiated, Fused
from lsce.primitive import one_by_one, primitive
from lsce.problem import Problem
from lsce.stats import TokenStats
from lsce.varying import varying
from lsce.wanted import Wanted


def weighted(
    backend: Any,
    problem: Problem,
    arrays: Arrays,
    weights: Float[Array, " N"],
    *,
    summed: bool,
    call: Any = None,
) -> tuple[Float[Array, " N"] | Float[Array, ""], TokenStats | None]:
    """w·L of each token, or the sum, and the statistics, on one device or one of a `shard_map`.

    A token whose label is −1 has no loss; a weight of NaN makes the loss and all gradients NaN.
    `call` replaces what the backend would make of the problem, for tuners and tests.
    """
    arrays, weights = varying((arrays, weights), like=(arrays, weights))
    if not isinstance(backend, Differentiated):
        losses, stats = backend.token_losses(problem, arrays)
        each = formula.weighted(weights, losses)
        return (jnp.sum(each) if summed else each), stats
    call = backend.call(problem) if call is None else call
    fusing = problem.gradient_filter in ("fused", "fp8") and summed
    if fusing and isinstance(backend, Fused) and backend.unfused(problem) is None:
        return _call(arrays, weights, function=_fused, backend=backend, call=call)
    each, stats = _call(arrays, weights, function=_each, backend=backend, call=call)
    return (jnp.sum(each) if summed else each), stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _each(backend, call, arrays, weights):
    """w_n·L_n of each token and the statistics."""
    arrays = _with_a_say(backend, call, arrays, weights)
    (losses, stats), _ = backend.forward(call, arrays, keep=False)
    return varying((formula.weighted(weights, losses), stats), like=weights)


def _each_fwd(backend, call, arrays, weights):
    wanted = Wanted.of(arrays.hidden, arrays.head, arrays.bias, weights)
    arrays, weights = _values((arrays, weights))
    if not wanted.weights:
        arrays = _with_a_say(backend, call, arrays, weights)
    (losses, stats), kept = backend.forward(call, _differentiable(backend, arrays), keep=True)
    out = varying((formula.weighted(weights, losses), stats), like=weights)
    return out, (wanted.as_residuals(), weights, losses, kept)


def _each_bwd(backend, call, saved, cotangents):
    g, _ = cotangents  # the statistics have no gradients
    if isinstance(g, SymbolicZero):
        return None, None
    wanted, weights, losses, kept = saved
    wanted = Wanted.from_residuals(wanted)
    d_weights = g * formula.finite_where_removed(weights, losses)
    g: Any = _differentiable(backend, g * weights)
    marks = _marks(call.problem, g)
    grads = backend.backward(call, kept, wanted, g, marks.sum())
    return varying((_marked(grads, marks), d_weights), like=weights)


_each.defvjp(_each_fwd, _each_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(backend, x) -> Any:
    """What goes into a derivative, itself: once more only if the backend can."""
    return x


@_differentiable.defjvp
def _differentiable_jvp(backend, primals, tangents):
    if not backend.twice_differentiable:
        raise TypeError(
            f"implementation={backend.name!r} has no second derivatives: take 'chunked'"
        )
    return primals[0], tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(backend, call, arrays, weights):
    """Σ_n w_n·L_n, whose gradients are made in the forward pass."""
    each: Any = _each(backend, call, arrays, weights)
    return jnp.sum(each[0]), None


def _fused_fwd(backend, call, arrays, weights):
    wanted = Wanted.of(arrays.hidden, arrays.head, arrays.bias, weights)
    arrays, weights = _values((arrays, weights))
    # An entry stands for a gradient that nobody asked for; see `Wanted`.
    d_hidden, d_head, losses = arrays.hidden[:1], arrays.head[:1], None
    some = _with_a_say(backend, call, arrays, weights)
    if wanted.hidden or wanted.head:
        into: Any = _differentiable(backend, (some, weights))
        marks = _marks(call.problem, weights)
        losses, grads = _in_one_piece(backend, call, wanted)(*into, marks.sum())
        d_hidden = _marked(grads, marks).hidden if wanted.hidden else d_hidden
        d_head = grads.head if wanted.head else d_head
    if wanted.weights or losses is None:  # those of tokens of weight 0, too
        (losses, _), _ = backend.forward(call, _differentiable(backend, arrays), keep=False)
    d_weights = formula.finite_where_removed(weights, losses) if wanted.weights else losses[:1]
    total = jnp.sum(formula.weighted(weights, losses))
    out, saved = varying(((total, None), (d_hidden, d_head, d_weights)), like=weights)
    return out, (wanted.as_residuals(), saved)


def _in_one_piece(backend: Any, call: Any, wanted: Wanted) -> Any:
    """(arrays, weights, mark) → the losses and gradients of `Fused.fused`.

    A scan takes the derivative of its body apart, so as to do once what all steps share, and would
    tear a kernel from the buffer that it writes to. It leaves whole what has a `vmap` of its own.
    """
    return jax.custom_batching.sequential_vmap(
        lambda arrays, weights, mark: backend.fused(call, arrays, weights, wanted, mark)
    )


def _fused_bwd(backend, call, saved, cotangents):
    g, _ = cotangents
    if isinstance(g, SymbolicZero):
        return None, None
    wanted, made = saved
    wanted = Wanted.from_residuals(wanted)
    d_hidden, d_head, d_weights = (
        # In float32, since bfloat16 does not hold every g.
        (g * x.astype(jnp.float32)).astype(x.dtype) if asked else None
        for x, asked in zip(made, (wanted.hidden, wanted.head, wanted.weights), strict=True)
    )
    return Arrays(d_hidden, d_head), d_weights


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)


def _with_a_say(backend: Any, call: Any, arrays: Arrays, weights: Float[Array, " N"]) -> Arrays:
    """The arrays with tokens of weight 0 as tokens without a loss.

    Not where statistics are asked for, which those tokens have, nor where the weight of 0 may be
    the variable of a second derivative.
    """
    if call.problem.return_stats or backend.twice_differentiable:
        return arrays
    return arrays._replace(labels=jnp.where(weights == 0.0, -1, arrays.labels))


def _marks(problem: Problem, g: Float[Array, " N"]) -> Float[Array, " examples"]:
    """0, or NaN where a token of the example, be it without a loss, has a cotangent of NaN: an
    invalid label.

    A backend adds their sum to the gradients that examples share, and `_marked` each to its own.
    """
    # Behind a barrier: XLA would else sum in one kernel with whatever a backend makes of the same
    # weights, on a single multiprocessor (benchmarks/notes/filter.md).
    g = lax.optimization_barrier(g)
    return jnp.sum(0.0 * g.reshape(problem.examples, -1), axis=1)


def _marked(grads: Arrays, marks: Float[Array, " examples"]) -> Arrays:
    if grads.hidden is None:
        return grads
    of_token = jnp.repeat(marks, grads.hidden.shape[0] // marks.shape[0])[:, None]
    return grads._replace(hidden=grads.hidden + of_token.astype(grads.hidden.dtype))


def _values(primals: Any) -> Any:
    """What a forward rule with symbolic zeros gets, without the word who is differentiated."""
    return jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))


def _batch(itself, args, axes, *, function, backend, call):
    """One call of all tokens where the examples share their head; else one call an example."""
    (arrays, weights), (of, of_weights) = args, axes
    static = {"function": function, "backend": backend, "call": call}
    size = next(
        x.shape[axis]
        for x, axis in zip((*arrays, weights), (*of, of_weights), strict=True)
        if axis is not None
    )
    problem = call.problem
    folded = dataclasses.replace(problem, n=size * problem.n, examples=size * problem.examples)
    shared = all(axis is None for axis in (of.head, of.bias, of.vocab_order))
    if not shared or backend.refuses(folded) is not None:
        return one_by_one(itself, args, axes, **static)

    def fold(x, axis):
        x = batching.bdim_at_front(x, axis, size)
        return x.reshape(-1, *x.shape[2:])

    arrays = arrays._replace(
        hidden=fold(arrays.hidden, of.hidden), labels=fold(arrays.labels, of.labels)
    )
    # The sum of each example needs a cotangent of its own, which fused gradients would not know.
    static |= {"function": _each, "call": backend.call(folded)}
    out = itself(arrays, fold(weights, of_weights), **static)
    each, stats = jax.tree.map(lambda x: x.reshape(size, problem.n), out)
    return (each.sum(1), None) if function is _fused else (each, stats)


# For the sake of `vmap`: a batched custom_vjp makes the head's gradient of every example before it
# sums them, where the tokens of several examples with one head are simply more tokens. A rule
# inside the derivative could not tell vmap(grad), which asks for the examples' own gradients, from
# grad(vmap).
_call = primitive(
    "linear_cross_entropy",
    lambda arrays, weights, *, function, backend, call: function(backend, call, arrays, weights),
    _batch,
)
