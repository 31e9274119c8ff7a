"""The forward kernel: one pass over the vocabulary that leaves sums per token and never a logit.

For a block of tokens and a stretch of the vocabulary a CTA keeps, in registers,

    m = max x,  l = Σ 2^(k(x−m)),  s = Σ x,      k·x = z·log2 e

and, when asked, what the statistics and the backward need (see `Sums`). The stretches are joined
afterwards by the log-sum-exp rule, which is a few kilobytes of work.

`stretches` says how the CTAs share the work.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce.backends.hopper.kernels import argmax, combine, marks
from lsce.backends.hopper.kernels.pipeline import COLUMN, ROW, i32
from lsce.backends.hopper.kernels.stretches import Stretches, summed
from lsce.backends.hopper.tiles import ForwardTiles
from lsce.sums import LogitSums

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# A maximum below every logit: finite, so that no ∞ − ∞ appears before the first tile.
LOWEST = -1e30


class Sums(NamedTuple):
    """Per-token results of the pass over the vocabulary, natural logarithms, float32 [N]."""

    lse: Float[Array, " N"]
    mean_logit: Float[Array, " N"]
    extra: dict[str, Array]
    """With statistics `confidence`, `prediction`, `entropy`, `sum_p_squared`, as in `TokenStats`;
    with marks `kept`, the mass of what lies above the filter; with squares `mean_square_logit`."""
    marks: Int[Array, "blocks 4 words"] | None
    """`marks.unpack` says what they mean; one block is `tile_n` tokens."""


def lse_forward(
    hidden: Float[Array, "N D"],
    head: Float[Array, "rows D"],
    bias: Float[Array, " V"] | None,
    threshold: Float[Array, " N"] | None,
    live: Int[Array, ""],
    *,
    tiles: ForwardTiles,
    scale: float,
    softcap: float | None,
    drop: float | Float[Array, ""] = 0.0,
    stats: bool = False,
    squares: bool = False,
    v: int | None = None,
    limit: Int[Array, ""] | None = None,
    ctas: int = 132,
    interpret: Any = None,
) -> Sums:
    """Runs the kernel over the first `live` tokens; later rows hold garbage.

    `threshold` (nats) asks for marks: a column is marked where a logit exceeds it, or exceeds the
    running maximum by more than `drop` (< 0), whichever is higher: of a row whose threshold is a
    bound of its lse plus `drop` neither exceeds lse + drop.
    Of the head's rows only the first `v` (static), or `limit` (traced), are classes.
    """
    n = hidden.shape[0]
    v = head.shape[0] if v is None else v
    marking = threshold is not None
    names = ["m", "l", "s"]
    names += ["best", "w", "q"] if stats else []
    names += ["kept"] if marking else []
    names += ["squares"] if squares else []
    masked = limit is not None or v % tiles.width != 0
    # x is the product itself where that is enough, which saves a multiplication an element. Masked
    # columns may be all that a maximum has seen, and k·LOWEST rounds too coarsely for a difference.
    plain = bias is None and softcap is None and scale > 0.0 and not masked
    k = scale * LOG2E if plain else 1.0

    row_bytes = hidden.shape[1] * hidden.dtype.itemsize
    cut = Stretches(n, v, row_bytes, live, tiles=tiles, ctas=ctas, limit=limit)

    def prepare(inputs, marks_gmem, end):
        bias_gmem, thr_gmem, drop_gmem = inputs
        fill = lambda x, dtype=jnp.float32: plgpu.layout_cast(
            jnp.full((tiles.tile_n,), x, dtype), ROW
        )
        below: Any = drop_gmem[0] if marking else None

        def begin(row0):
            thr = None
            if marking:
                thr_ref = thr_gmem.at[pl.ds(row0, tiles.tile_n)]
                thr = plgpu.load(thr_ref, layout=ROW, optimized=False) * (LOG2E / k)
            start = {name: fill(LOWEST if name == "m" else 0.0) for name in names}
            if stats:
                start["best"] = fill(0, jnp.int32)
            return start, lambda acc, tile, old: update(acc, tile, row0, thr, old)

        def classes(x, col0, value):
            """x with another value in the columns of the last tile that are no classes."""

            def cut_off(x):
                column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
                return jnp.where(column < end - col0, x, value)

            return lax.cond(col0 + tiles.tile_v > end, cut_off, lambda x: x, x)

        def moments(x):
            return {"s": x, "squares": x * x} if squares else {"s": x}

        def update(acc, tile, row0, thr, old):
            col0 = tile * tiles.tile_v
            x = acc if plain else acc * (scale * LOG2E)
            if bias is not None:
                part = bias_gmem.at[pl.ds(col0, tiles.tile_v)]
                part = plgpu.load(part, layout=COLUMN, optimized=False)
                x = x + lax.broadcast_in_dim(part, acc.shape, [1])
            if softcap is not None:
                # tanh(z / cap) = 1 − 2 / (e^(2z/cap) + 1)
                root = lax.rsqrt(jnp.exp2(x * (2.0 / softcap)) + 1.0)
                x = root * root * (-2.0 * LOG2E * softcap) + LOG2E * softcap
            new, sums = {}, {}
            if masked:
                x = classes(x, col0, 0.0)
                sums = summed(x, moments)
                x = classes(x, col0, LOWEST)
            top = x.max(axis=1)
            if stats:
                new["best"] = argmax.update(
                    old["best"], x, top, old["m"], col0, interpret=interpret is not None
                )
            m = new["m"] = jnp.maximum(old["m"], top)
            bound = jnp.maximum(thr, m + below) if marking else None
            if marking:
                block = lax.div(row0, i32(tiles.tile_n))
                marks.store(
                    x, top, bound, marks_gmem[0], block, tile, interpret=interpret is not None
                )

            def terms(x):
                wide = lambda row: lax.broadcast_in_dim(row, x.shape, [0])
                offset = x * k - wide(m * k)
                p = jnp.exp2(offset)
                terms = {"l": p} if masked else {"l": p} | moments(x)
                if stats:
                    terms |= {"w": p * offset, "q": p * p}
                if marking:
                    terms["kept"] = jnp.where(x > wide(bound), p, 0.0)
                return terms

            sums |= summed(x, terms)
            return new | {
                name: combine.relative_to(m, old, name, k) + value for name, value in sums.items()
            }

        return begin

    bias_in = jnp.zeros((8,), jnp.float32)
    if bias is not None:
        bias_in = jnp.maximum(bias.astype(jnp.float32) * LOG2E, LOWEST)
        bias_in = jnp.pad(bias_in, (0, cut.columns - bias.shape[0]))
    thr_in = jnp.zeros((8,), jnp.float32)
    if marking:
        # An infinite threshold keeps rows without a loss from marking anything.
        thr_in = jnp.pad(threshold, (0, cut.rows - n), constant_values=jnp.inf)
    drop_in = jnp.full(8, drop, jnp.float32) * (LOG2E / k)
    part, marked = cut.sums(
        hidden,
        head,
        (bias_in, thr_in, drop_in),
        names,
        prepare,
        lambda a, b: combine.join(a, b, k),
        marked=int(marking),
        interpret=interpret,
        name="lsce_forward",
    )
    valid = cut.valid
    of: Any = lambda name, unit: jnp.where(valid, part[name], 0.0) * unit if name in part else None
    sums = LogitSums(
        maximum=jnp.where(valid, part["m"] * (k * LN2), -jnp.inf),
        plain=of("s", k * LN2),
        exp=of("l", 1.0),
        argmax=part.get("best"),
        shifted_exp=of("w", LN2),
        exp_squared=of("q", 1.0),
        kept=of("kept", 1.0),
        squares=of("squares", (k * LN2) ** 2),
    ).over(0)
    extra = {}
    if stats:
        extra["confidence"] = sums.confidence
        extra["prediction"] = sums.argmax
        extra["entropy"] = sums.entropy
        extra["sum_p_squared"] = sums.sum_p_squared
    if sums.kept is not None:
        extra["kept"] = sums.kept / sums.exp
    if sums.squares is not None:
        extra["mean_square_logit"] = sums.squares / v
    lse, mean_logit = sums.lse, sums.plain / v
    if bias is not None and softcap is None:
        # The kernel has LOWEST for a bias of −∞.
        mean_logit = jnp.where(jnp.isneginf(bias).any(), -jnp.inf, mean_logit)
    # Without the barrier XLA would make all of this in the one CTA of some sum over the tokens.
    lse, mean_logit, extra = lax.optimization_barrier((lse, mean_logit, extra))
    return Sums(lse, mean_logit, extra, marked[0] if marking else None)


def capped(z, softcap: float):
    """tanh(z / softcap) from one exponential and one reciprocal square root.

    The hardware's own tanh is good to 2^-11 only; this form is off by a few float32 roundings of 1,
    so that a capped logit is off by about 1e-7 of the cap.
    """
    root = lax.rsqrt(jnp.exp2(z * (2.0 * LOG2E / softcap)) + 1.0)
    return 1.0 - 2.0 * root * root
