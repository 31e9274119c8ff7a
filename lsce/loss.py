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
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from lsce import formula
from lsce.backends import Arrays, Differentiated, Fused
from lsce.problem import Problem
from lsce.stats import TokenStats
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
    fusing = problem.gradient_filter == "fused" and summed
    if fusing and isinstance(backend, Fused) and backend.unfused(problem) is None:
        return _bind(_fused, backend, call, arrays, weights)
    each, stats = _bind(_each, backend, call, arrays, weights)
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
    passed: Any = _in_one_piece(backend, call, arrays)
    (losses, stats), kept = passed
    out = varying((formula.weighted(weights, losses), stats), like=weights)
    return out, (wanted.as_residuals(), weights, losses, kept)


def _each_bwd(backend, call, saved, cotangents):
    g, _ = cotangents  # the statistics have no gradients
    if isinstance(g, SymbolicZero):
        return None, None
    wanted, weights, losses, kept = saved
    wanted = Wanted.from_residuals(wanted)
    d_weights = g * formula.finite_where_removed(weights, losses)
    g = g * weights
    grads = backend.backward(call, kept, wanted, g, _mark(g))
    return varying((grads, d_weights), like=weights)


_each.defvjp(_each_fwd, _each_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _in_one_piece(backend, call, arrays):
    """The forward pass as something of which `jax.checkpoint` saves all or nothing.

    Its policies may save the result of every matrix product, and here those are all of the logits.
    The rule below is what JAX would do itself, for second derivatives. It is no custom_vjp: under
    `vmap` that counts the cotangent of a result that examples share, such as the head, once for
    each of them.
    """
    return backend.forward(call, arrays, keep=True)


@_in_one_piece.defjvp
def _in_one_piece_jvp(backend, call, primals, tangents):
    if not backend.twice_differentiable:
        raise TypeError(
            f"implementation={backend.name!r} has no second derivatives: take 'chunked'"
        )
    forward = functools.partial(backend.forward, call, keep=True)
    return jax.jvp(forward, primals, tangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(backend, call, arrays, weights):
    """Σ_n w_n·L_n, whose gradients are made in the forward pass."""
    each: Any = _each(backend, call, arrays, weights)
    return (jnp.sum(each[0]),)


def _fused_fwd(backend, call, arrays, weights):
    wanted = Wanted.of(arrays.hidden, arrays.head, arrays.bias, weights)
    arrays, weights = _values((arrays, weights))
    # An entry stands for a gradient that nobody asked for; see `Wanted`.
    d_hidden, d_head, losses = arrays.hidden[:1], arrays.head[:1], None
    some = _with_a_say(backend, call, arrays, weights)
    if wanted.hidden or wanted.head:
        losses, grads = backend.fused(call, some, weights, wanted, _mark(weights))
        d_hidden = grads.hidden if wanted.hidden else d_hidden
        d_head = grads.head if wanted.head else d_head
    if wanted.weights or losses is None:  # those of tokens of weight 0, too
        (losses, _), _ = backend.forward(call, arrays, keep=False)
    d_weights = formula.finite_where_removed(weights, losses) if wanted.weights else losses[:1]
    total = jnp.sum(formula.weighted(weights, losses))
    out, saved = varying(((total,), (d_hidden, d_head, d_weights)), like=weights)
    return out, (wanted.as_residuals(), saved)


def _fused_bwd(backend, call, saved, cotangents):
    (g,) = cotangents
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


def _mark(g: Float[Array, " N"]) -> Float[Array, ""]:
    """0, or NaN where a token, be it without a loss, has a cotangent of NaN: an invalid label.

    A backend adds it to every gradient.
    """
    return jnp.sum(0.0 * g)


def _values(primals: Any) -> Any:
    """What a forward rule with symbolic zeros gets, without the word who is differentiated."""
    return jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))


def varying(arrays: Any, *, like: Any) -> Any:
    """`arrays`, inside `shard_map` as varying over the devices as the most varying of `like`.

    The gradient of an input then is the device's own, and JAX sums it where the input was the same
    on all of them.
    """
    axes = frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(like))
    )

    def cast(x: Any) -> Any:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


# `_each` and `_fused` as a primitive, for the sake of `vmap`: a batched custom_vjp makes the head's
# gradient of every example before it sums them, where the tokens of several examples with one head
# are simply more tokens. `custom_vmap` around it cannot be differentiated in reverse, and inside it
# cannot tell vmap(grad), which asks for the examples' own gradients, from grad(vmap).
_primitive = Primitive("linear_cross_entropy")
_primitive.multiple_results = True


def _bind(function, backend, call, arrays: Arrays, weights) -> Any:
    flat, tree = jax.tree.flatten((arrays, weights))
    out = _primitive.bind(*flat, function=function, backend=backend, call=call, tree=tree)
    if function is _fused:
        return out[0], None
    each, *stats = out
    return each, TokenStats(*stats) if stats else None


@functools.partial(jax.jit, static_argnames=("function", "backend", "call", "tree"))
def _flat(*flat, function, backend, call, tree):
    arrays, weights = jax.tree.unflatten(tree, flat)
    return jax.tree.leaves(function(backend, call, arrays, weights))


def _abstract(*avals, **params):
    jaxpr = _flat.trace(*avals, **params).jaxpr
    return jaxpr.out_avals, jaxpr.effects


def _jvp(primals, tangents, **params):
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of(*some):
        changed = dict(zip(moving, some, strict=True))
        return _flat(*(changed.get(i, x) for i, x in enumerate(primals)), **params)

    x, dx = ([xs[i] for i in moving] for xs in (primals, tangents))
    out, (d_first, *_) = jax.jvp(of, x, dx)
    none = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out[1:]]
    return out, [d_first, *none]


def _batch(flat, axes, *, function, backend, call, tree):
    """One call of all tokens where the examples share their head; else one call an example."""
    size = next(x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None)
    arrays, weights = jax.tree.unflatten(tree, flat)
    of, of_weights = jax.tree.unflatten(tree, axes)
    problem = call.problem
    folded = dataclasses.replace(problem, n=size * problem.n)
    shared = all(axis is None for axis in (of.head, of.bias, of.vocab_order))
    if not shared or backend.refuses(folded) is not None:
        params = {"function": function, "backend": backend, "call": call, "tree": tree}
        out = _one_by_one(*flat, axes=tuple(axes), **params)
        return out, [0] * len(out)

    def fold(x, axis):
        x = batching.bdim_at_front(x, axis, size)
        return x.reshape(-1, *x.shape[2:])

    arrays = arrays._replace(
        hidden=fold(arrays.hidden, of.hidden), labels=fold(arrays.labels, of.labels)
    )
    weights = fold(weights, of_weights)
    # The sum of each example needs a cotangent of its own, which fused gradients would not know.
    each, stats = _bind(_each, backend, backend.call(folded), arrays, weights)
    out = [x.reshape(size, problem.n) for x in jax.tree.leaves((each, stats))]
    if function is _fused:
        out = [out[0].sum(1)]
    return out, [0] * len(out)


@functools.partial(jax.jit, static_argnames=("axes", "function", "backend", "call", "tree"))
def _one_by_one(*flat, axes, **params):
    batched = [i for i, axis in enumerate(axes) if axis is not None]

    def one(some):
        changed = dict(zip(batched, some, strict=True))
        return _primitive.bind(*(changed.get(i, x) for i, x in enumerate(flat)), **params)

    return lax.map(one, [jnp.moveaxis(flat[i], axes[i], 0) for i in batched])


_primitive.def_impl(_flat)
_primitive.def_effectful_abstract_eval(_abstract)
mlir.register_lowering(_primitive, mlir.lower_fun(_flat, multiple_results=True))
ad.primitive_jvps[_primitive] = _jvp
batching.primitive_batchers[_primitive] = _batch
