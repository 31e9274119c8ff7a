"""The gradients from what the forward saved: coefficients, the sums over P, and what is of rank 1.

    dz_nv = [(1 + 2λ·lse_n)·p_nv − (1−β)·1[v = y_n] − β/V]·J_nv     (J the softcap's slope, or 1)
    dE_n = g_n·scale·Σ_v dz_nv·C_v      dC_v = Σ_n g_n·scale·dz_nv·E_n      db_v = Σ_n g_n·dz_nv

The softmax and the target's term are in P, made tile by tile; the smoothing is added as rank 1, and
to dE what rounding the target's term cut off.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsce import formula, rounding
from lsce.backends import Arrays
from lsce.backends.hopper import exact, filtered, tail
from lsce.backends.hopper.call import Call
from lsce.backends.hopper.chunks import Products
from lsce.backends.hopper.forward import Saved
from lsce.sparse.coefficients import Coefficients, coefficients
from lsce.wanted import Wanted


def gradients(
    call: Call,
    saved: Saved,
    wanted: Wanted,
    cotangent: Float[Array, " N"],
    mark: Float[Array, ""],
) -> Arrays:
    """Gradients of hidden [N, D], head and bias, None where nobody asked."""
    p, sums = call.problem, saved.sums
    c = coefficients(
        p,
        cotangent,
        mark,
        row_of_token=saved.row_of_token,
        live=saved.live,
        lse=sums.lse,
        mean_square_logit=sums.extra.get("mean_square_logit"),
    )
    products = _products(call, saved, c, wanted)
    dhidden = dbias = None
    if wanted.hidden:
        dhidden = _with_rank_one(call, saved, c, products)
        lost = rounding.lost(_target_entry(call, saved, c), saved.hidden.dtype)
        dhidden = dhidden + rounding.given_back(lost, saved.head, saved.labels)
        dhidden = dhidden[saved.row_of_token].astype(saved.hidden.dtype)
    if wanted.bias and saved.bias is not None:
        dbias = (products.bias - (c.s * c.kappa).sum()) / p.logit_scale + c.poison
        dbias = dbias.astype(saved.bias.dtype)
    return Arrays(dhidden, products.head if wanted.head else None, None, dbias)


def _products(call: Call, saved: Saved, c: Coefficients, wanted: Wanted) -> Products:
    """The sums over P: all of it, what the filter leaves, or that for dE and all for the rest.

    All of it in 16 bits, or in 8 where the filter leaves it out, or would keep most blocks whole.
    """
    if call.epsilon is None:
        return exact.products(call, saved, c, wanted)
    whole = filtered.flat_blocks(saved)
    if call.tail:
        # None is kept whole: the tail has what the tiles lack.
        tiled = filtered.planned(call, saved, jnp.zeros_like(whole))
        return tail.products(call, saved, c, wanted, tiled)
    if call.tail_where_flat:
        # The plan serves either way, and its small kernels are launched before the host looks.
        flat = filtered.mostly_flat(call, saved, whole)
        tiled = filtered.planned(call, saved, whole & ~flat)
        flat, tiled = lax.optimization_barrier((flat, tiled))
        return lax.cond(
            flat,
            lambda c: tail.where_flat(call, saved, c, wanted, tiled),
            lambda c: filtered.products(call, saved, c, wanted, tiled),
            c,
        )
    tiled = filtered.planned(call, saved, whole)
    if call.filters_head or not (wanted.head or wanted.bias):
        return filtered.products(call, saved, c, wanted, tiled)
    some = filtered.products(call, saved, c, wanted._replace(head=False, bias=False), tiled)
    # One after the other: the buffers of the second may lie where those of the first did.
    a, some = lax.optimization_barrier((c.a, some))
    every = exact.products(call, saved, c._replace(a=a), wanted._replace(hidden=False))
    return every._replace(hidden=some.hidden, kept=some.kept)


def _target_entry(call: Call, saved: Saved, c: Coefficients) -> Float[Array, " rows"]:
    """The target's entry of P, as the kernel makes it before it is rounded."""
    slope = formula.softcap_slope(call.problem, saved.target)
    entry = (c.a * jnp.exp(saved.target - c.lse) - c.b) * slope
    return entry - c.s * (slope - c.kappa) if call.dense_smoothing else entry


def _with_rank_one(
    call: Call, saved: Saved, c: Coefficients, found: Products
) -> Float[Array, "rows D"]:
    """Adds to dE what acts on all columns alike, through one row of the head that stands for many.

    The smoothing acts through the mean row, and what the filter dropped through that or its own.
    """
    p, dhidden = call.problem, found.hidden
    if call.epsilon is None and p.label_smoothing == 0.0:
        return dhidden
    smoothing = -c.s * c.kappa * p.v
    center = jnp.mean(saved.head[: p.v], axis=0, dtype=jnp.float32)
    if call.epsilon is None:
        return dhidden + smoothing[:, None] * center[None, :]
    dropped, row = filtered.dropped_pull(call, saved, c, found)
    if row is None:
        return dhidden + (smoothing + dropped)[:, None] * center[None, :]
    return dhidden + smoothing[:, None] * center[None, :] + dropped[:, None] * row[None, :]
