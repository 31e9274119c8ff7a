"""A function as a primitive of JAX's, which gives it a `vmap` of its own.

`jax.custom_batching.custom_vmap` does no more than this, but cannot be differentiated in reverse.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def one_by_one(function: Any, args: Any, axes: Any, /, **static: Any) -> Any:
    """function(*args, **static) of one example after the other.

    `axes` is like args, None where all examples share an array; those of the result are 0.
    """
    leaves, tree = jax.tree.flatten(args)
    axes = tree.flatten_up_to(axes)
    batched = [i for i, axis in enumerate(axes) if axis is not None]

    def one(some):
        changed = dict(zip(batched, some, strict=True))
        same = (changed.get(i, x) for i, x in enumerate(leaves))
        return function(*jax.tree.unflatten(tree, same), **static)

    return lax.map(one, [jnp.moveaxis(leaves[i], axes[i], 0) for i in batched])


def primitive(name: str, function: Any, batch: Callable[..., Any] = one_by_one) -> Any:
    """`function(*args, **static)` of arrays in trees and hashable values, as a primitive.

    `jit` around a call of it, JAX differentiates it as if it were none, and `vmap` calls
    batch(primitive, args, axes, **static), whose results have their examples along axis 0.
    """
    made = Primitive(name)
    made.multiple_results = True

    def named(*leaves, tree, static):
        return function(*jax.tree.unflatten(tree, leaves), **dict(static))

    named.__name__ = name  # as profiles show it
    jitted = jax.jit(named, static_argnames=("tree", "static"))

    def flat(*leaves, **params):
        return jax.tree.leaves(jitted(*leaves, **params))

    def call(*args, **static):
        leaves, tree = jax.tree.flatten(args)
        params = {"tree": tree, "static": tuple(static.items())}
        traced = jitted.trace(*map(jax.typeof, leaves), **params)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), made.bind(*leaves, **params))

    def abstract(*avals, **params):
        jaxpr = jitted.trace(*avals, **params).jaxpr
        return jaxpr.out_avals, jaxpr.effects

    def jvp(primals, tangents, **params):
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

        def moved(*some):
            changed = dict(zip(moving, some, strict=True))
            return flat(*(changed.get(i, x) for i, x in enumerate(primals)), **params)

        x, dx = ([xs[i] for i in moving] for xs in (primals, tangents))
        out, d_out = jax.jvp(moved, x, dx)
        return out, [
            ad.Zero(jax.typeof(x).to_tangent_aval()) if d.dtype == jax.dtypes.float0 else d
            for x, d in zip(out, d_out, strict=True)
        ]

    @functools.partial(jax.jit, static_argnames=("axes", "tree", "static"))
    def batched(*leaves, axes, tree, static):
        args, axes = (jax.tree.unflatten(tree, x) for x in (leaves, axes))
        return jax.tree.leaves(batch(call, args, axes, **dict(static)))

    def vmap(leaves, axes, **params):
        out = batched(*leaves, axes=tuple(axes), **params)
        return out, [0] * len(out)

    made.def_impl(flat)
    made.def_effectful_abstract_eval(abstract)
    mlir.register_lowering(made, mlir.lower_fun(flat, multiple_results=True))
    ad.primitive_jvps[made] = jvp
    batching.primitive_batchers[made] = vmap
    return call
