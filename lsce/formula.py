"""The loss of one token as formulas, written once for every backend.

    z_v  = cap · tanh(u_v / cap),  u_v = scale · E·C_v + bias_v       (z = u without softcap)
    L    = lse − (1−β)·z_y − (β/V)·Σ_v z_v + λ·lse²                   (lse = log Σ_v exp z_v)
    dL/dz_v = (1 + 2λ·lse)·p_v − (1−β)·1[v = y] − β/V                 (p = softmax z)

All in float32 and nats. β/V goes to every class, the target included (paper Eq. 5 and 15).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsce.problem import Problem


def logits(
    problem: Problem, product: Float[Array, "N V"], bias: Float[Array, " V"] | None
) -> Float[Array, "N V"]:
    """z of some columns from their products E·C and their part of the bias."""
    z = product * problem.logit_scale
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None, :]
    z = capped(problem, z)
    if problem.logit_scale == 1.0 and problem.softcap is None:
        return z
    # Rounded once: a compiler that makes z − max z one fused multiply-add takes another z there
    # than in the maximum, and for logits of 1e6 the probabilities no longer sum to 1.
    return lax.optimization_barrier(z)


def capped(problem: Problem, u: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """z of logits u before the cap."""
    cap = problem.softcap
    return u if cap is None else cap * jnp.tanh(u / cap)


def softcap_slope(problem: Problem, z: Float[Array, "*s"]) -> Float[Array, "*s"] | float:
    """dz/du where the capped logit is z: 1 − (z / cap)², and 1 without softcap."""
    return 1.0 if problem.softcap is None else 1.0 - jnp.square(z / problem.softcap)


def token_loss(
    problem: Problem,
    lse: Float[Array, " N"],
    target_logit: Float[Array, " N"],
    mean_logit: Float[Array, " N"],
) -> Float[Array, " N"]:
    """L, where `mean_logit` = (1/V) Σ_v z_v."""
    # A term whose factor is 0 is left out: a class masked by a bias of −∞ makes it 0 · ∞.
    loss = lse
    if problem.label_smoothing < 1.0:
        loss = loss - (1.0 - problem.label_smoothing) * target_logit
    if problem.label_smoothing > 0.0:
        loss = loss - problem.label_smoothing * mean_logit
    if problem.z_loss > 0.0:
        loss = loss + problem.z_loss * jnp.square(lse)
    return loss


def softmax_weight(problem: Problem, lse: Float[Array, " N"]) -> Float[Array, " N"] | float:
    """The factor of p in dL/dz: 1 + 2λ·lse."""
    return 1.0 if problem.z_loss == 0.0 else 1.0 + 2.0 * problem.z_loss * lse


def weighted(weights: Float[Array, " N"], losses: Float[Array, " N"]) -> Float[Array, " N"]:
    """w·L, and 0 where w is 0: the loss of a removed token may be infinite, and 0 · ∞ is NaN."""
    return weights * finite_where_removed(weights, losses)


def finite_where_removed(
    weights: Float[Array, " N"], losses: Float[Array, " N"]
) -> Float[Array, " N"]:
    """The derivative of w·L by w: L, but 0 where w is 0 and L is infinite."""
    return jnp.where((weights == 0.0) & ~jnp.isfinite(losses), 0.0, losses)
