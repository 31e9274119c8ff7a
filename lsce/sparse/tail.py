"""The tail in 8 bits: what a filter leaves out, computed with e4m3 operands instead of dropped.

With ē the mean hidden state, c̄ the mean row of the head, and hidden channels brought to one size,

    E₈ = e4m3((E − ē)·h)      C₈ = e4m3((C − c̄)·c)      h_d·c_d·unit = 1 for every channel d
    z  ≈ unit·E₈·C₈ᵀ + ē·C_v + (E_n − ē)·c̄              the last two exact, of rank 1
    T  = a·p·J − s·(J − κ)                               (`coefficients`), p from that z
    T₈ = e4m3(T·r_n) of the pairs that the filter leaves out, else 0
    E₉ = e4m3(E_n / r_n)

    dE_n += Σ_v T₈·C₈ / (r_n·c) + (Σ_v T_nv)·c̄          dC_v += Σ_n T₈·E₉

where r_n makes of the largest T, of p = ε, the largest number of e4m3. The p of a pair left out is
no more than ε; made of that z it is off by up to a factor of e^2.7 on real activations, and of any
on logits of thousands, so it is cut off there.

An e4m3 number has four significant bits over 15 binades, below which it loses them, and products
are summed with about 14 bits. That is enough because a tail is small. On SmolLM2 135M's
activations z is off by 0.15 nats (root mean square), dE by 0.0011 and dC by 0.0004 in all, nearly
all of it through z (benchmarks/notes/fp8.md): one scale a channel is as good as one a row besides,
e4m3 as good as e5m2, and neither E₉ nor the sums need more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float8e4m3fn, Int

from lsce import formula
from lsce.problem import Problem, cdiv
from lsce.sparse.coefficients import Coefficients

E4M3 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(E4M3).max)
SMALLEST_REACH = 1 / 16
"""Of LARGEST: what the head's numbers reach in every channel, however little hidden states differ
there. Products of such a channel add next to nothing to z, but dE has what the head has there."""

EVERY = 32
"""Of so many rows of the head a sample has one."""
ROOM = 8.0
"""How much longer rows may be than those of a sample before they are cut off."""


class Scales(NamedTuple):
    """How hidden states and head become e4m3."""

    hidden_mean: Float[Array, " D"]
    """ē."""
    head_mean: Float[Array, " D"]
    """c̄."""
    hidden: Float[Array, " D"]
    """h: factors of E − ē."""
    head: Float[Array, " D"]
    """c: factors of C − c̄."""
    unit: Float[Array, ""]
    """What a product of both stands for."""


def scales_by_sample(
    hidden: Float[Array, "rows D"],
    live: Int[Array, ""],
    head: Float[Array, "head_rows D"],
    v: int,
) -> Scales:
    """`scales` from some of the head's rows, with room for others that are longer.

    To find the head's mean and ranges takes as long as to make C₈. Neither need be exact: what is
    made of them accounts for any mean, and e4m3 has as many bits at a tenth of its range.
    """
    s = scales(hidden, live, head[:v:EVERY], cdiv(v, EVERY))
    return s._replace(head=s.head / ROOM, unit=s.unit * ROOM)


def scales(
    hidden: Float[Array, "rows D"],
    live: Int[Array, ""],
    head: Float[Array, "head_rows D"],
    v: int,
) -> Scales:
    """Of the first `live` hidden states and the first v rows of the head, each read once.

    A hidden state that is not finite spoils no other's.
    """
    in_use = (jnp.arange(hidden.shape[0]) < live)[:, None] & jnp.isfinite(hidden)
    some = jnp.maximum(live, 1).astype(jnp.float32)
    hidden_mean = hidden.sum(0, dtype=jnp.float32, where=in_use) / some
    head_mean = jnp.mean(head[:v], axis=0, dtype=jnp.float32)
    largest_hidden = _farthest(hidden, hidden_mean, in_use)
    largest_head = _farthest(head[:v], head_mean, None)
    reach = jnp.sqrt(largest_hidden * largest_head)
    top = jnp.max(reach)
    top = jnp.where(top > 0.0, top, 1.0)
    reach = jnp.maximum(reach / top, SMALLEST_REACH) * LARGEST
    unit = jnp.square(top / LARGEST)
    # A channel in which the head is constant says nothing.
    some = largest_head > 0.0
    head_factor = jnp.where(some, reach / jnp.where(some, largest_head, 1.0), 0.0)
    hidden_factor = jnp.where(some, 1.0 / (jnp.where(some, head_factor, 1.0) * unit), 0.0)
    return Scales(hidden_mean, head_mean, hidden_factor, head_factor, unit)


def _farthest(x: Array, mean: Float[Array, " D"], where: Array | None) -> Float[Array, " D"]:
    """The largest |x − mean| of each channel, from its largest and smallest x."""
    most = jnp.max(x, axis=0, initial=-jnp.inf, where=where).astype(jnp.float32)
    least = jnp.min(x, axis=0, initial=jnp.inf, where=where).astype(jnp.float32)
    return jnp.maximum(jnp.maximum(most - mean, mean - least), 0.0)


def e4m3(x: Float[Array, "*s"]) -> Float8e4m3fn[Array, "*s"]:
    """The nearest e4m3 number, at most the largest."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(E4M3)


def quantised(
    x: Float[Array, "rows D"], mean: Float[Array, " D"], factor: Float[Array, " D"]
) -> Float8e4m3fn[Array, "rows D"]:
    """E₈ or C₈."""
    return e4m3((x.astype(jnp.float32) - mean[None, :]) * factor[None, :])


def row_factors(c: Coefficients, log_epsilon: float | Float[Array, ""]) -> Float[Array, " rows"]:
    """r: what T is multiplied by before it is rounded; 0 in rows whose T is 0."""
    most = jnp.abs(c.a) * jnp.exp(log_epsilon) + jnp.abs(c.s)
    usable = most > jnp.finfo(jnp.float32).tiny * LARGEST
    return jnp.where(usable, LARGEST / jnp.where(usable, most, 1.0), 0.0)


def inverse(r: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """1/r, and 0 where r is."""
    return jnp.where(r > 0.0, 1.0 / jnp.where(r > 0.0, r, 1.0), 0.0)


def of_tokens(
    hidden: Float[Array, "rows D"], r: Float[Array, " rows"]
) -> tuple[Float8e4m3fn[Array, "rows D"], Float[Array, " D"]]:
    """E₉ with one more factor a channel, and by what a product of it is to be multiplied."""
    x = hidden.astype(jnp.float32) * inverse(r)[:, None]
    largest = jnp.max(jnp.abs(x), axis=0)
    unit = jnp.where(largest > 0.0, largest / LARGEST, 1.0)
    return e4m3(x / unit[None, :]), unit


class Tail(NamedTuple):
    """What the tail adds, before what is of rank 1 along c̄."""

    hidden: Float[Array, "rows D"]
    head: Float[Array, "V D"]
    mass: Float[Array, " rows"]
    """Σ_v T."""


def emulated(
    problem: Problem,
    s: Scales,
    c: Coefficients,
    log_epsilon: float | Float[Array, ""],
    hidden: Float[Array, "rows D"],
    head: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    left_out: Bool[Array, "rows V"],
) -> Tail:
    """The tail of the pairs `left_out` in plain JAX, with exact sums: what kernels are held to."""

    def product(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.dot(a, b, precision=lax.Precision.HIGHEST)

    e8 = quantised(hidden, s.hidden_mean, s.hidden)
    c8 = quantised(head, s.head_mean, s.head)
    z = s.unit * product(e8, c8.T) + product(head, s.hidden_mean)[None, :]
    z = z + product(hidden.astype(jnp.float32) - s.hidden_mean[None, :], s.head_mean)[:, None]
    z = formula.logits(problem, z, bias)
    slope = formula.softcap_slope(problem, z)
    terms = c.a[:, None] * jnp.exp(jnp.minimum(z - c.lse[:, None], log_epsilon)) * slope
    if problem.softcap is not None and problem.label_smoothing > 0.0:
        terms = terms - c.s[:, None] * (slope - c.kappa[:, None])
    terms = jnp.where(left_out, terms, 0.0)
    r = row_factors(c, log_epsilon)
    t8 = e4m3(terms * r[:, None])
    e9, unit = of_tokens(hidden, r)
    return Tail(
        product(t8, c8) * (s.unit * s.hidden)[None, :] * inverse(r)[:, None],
        product(t8.T, e9) * unit[None, :],
        terms.sum(1),
    )
