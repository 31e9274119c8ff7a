"""The factors of the gradient's terms, one of each a token, the cotangent g included.

    dz_nv = [(1 + 2λ·lse_n)·p_nv − (1−β)·1[v = y_n] − β/V]·J_nv     (J the softcap's slope, or 1)

becomes, with a, b and s from here and κ the part of J that is the same for every column,

    g_n·scale·dz_nv = (a_n·p_nv − b_n·1[v = y_n])·J_nv − s_n·(J_nv − κ_n) − s_n·κ_n

of which a backend makes all but the last term tile by tile; that is of rank 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsce import formula
from lsce.problem import Problem


class Coefficients(NamedTuple):
    """One value a row, the cotangent included; 0 in rows without a loss."""

    lse: Float[Array, " rows"]
    """∞ in rows without a loss."""
    a: Float[Array, " rows"]
    """The coefficient of p."""
    b: Float[Array, " rows"]
    """The coefficient of the target."""
    s: Float[Array, " rows"]
    """The coefficient of the smoothing, for each column."""
    kappa: Float[Array, " rows"]
    """κ: the part of the smoothing that is the same for every column and added as rank 1."""
    poison: Float[Array, ""]
    """0, or NaN so that all gradients are."""


def coefficients(
    problem: Problem,
    cotangent: Float[Array, " N"],
    mark: Float[Array, ""],
    *,
    row_of_token: Int[Array, " N"],
    live: Int[Array, ""],
    lse: Float[Array, " rows"],
    mean_square_logit: Float[Array, " rows"] | None = None,
) -> Coefficients:
    """Those of the first `live` rows; what the others hold does not matter.

    Smoothing under a softcap is not of rank 1. Without `mean_square_logit` all of it is left to the
    tiles, which must then be all there are. With it κ is about J's mean over the columns, which
    stands for those that a filter skips, and the tiles hold the difference for the others.
    """
    in_use = jnp.arange(lse.shape[0]) < live
    by_row = jnp.zeros(lse.shape[0], jnp.float32).at[row_of_token].set(cotangent)
    g = jnp.where(in_use, by_row, 0.0) * problem.logit_scale
    lse = jnp.where(in_use, lse, 0.0)
    kappa = jnp.ones_like(g)
    if problem.softcap is not None and problem.label_smoothing > 0.0:
        kappa = jnp.zeros_like(g)
        if mean_square_logit is not None:
            mean_square = jnp.where(in_use, mean_square_logit, 0.0)
            kappa = formula.softcap_slope(problem, jnp.sqrt(mean_square)) * jnp.ones_like(g)
    return Coefficients(
        # Infinite, so that p is 0: exp(z − 0) of a large bias is ∞, and ∞ · 0 would reach dC.
        lse=jnp.where(in_use, lse, jnp.inf),
        a=g * formula.softmax_weight(problem, lse),
        b=g * (1.0 - problem.label_smoothing),
        s=g * problem.label_smoothing / problem.v,
        kappa=kappa,
        poison=mark,
    )
