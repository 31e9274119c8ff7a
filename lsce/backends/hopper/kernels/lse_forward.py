"""The forward kernel: one pass over the vocabulary that leaves sums per token and never a logit.

For a block of tokens and a stretch of the vocabulary a CTA keeps, in registers,

    m = max x,  l = Σ 2^(k(x−m)),  s = Σ x,      k·x = z·log2 e

and, when asked, what the statistics and the backward need (see `Sums`). The stretches are joined
afterwards by the log-sum-exp rule, which is a few kilobytes of work.

The two consumers of a CTA stand side by side: the same tokens, different columns. One of them lags
behind by half of D: a sum may begin anywhere, so it starts each tile with the half that the other
one ends with, and from the same stages of the hidden states. So while one is in its epilogue the
other is in the middle of a tile and keeps the tensor cores busy.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce.backends.hopper import schedule
from lsce.backends.hopper.kernels import argmax, combine, marks
from lsce.backends.hopper.kernels.pipeline import COLUMN, ROW, Stream, i32, launch, run
from lsce.backends.hopper.tiles import ForwardTiles
from lsce.sums import LogitSums

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# A maximum below every logit: finite, so that no ∞ − ∞ appears before the first tile.
LOWEST = -1e30
AT_A_TIME = 8
"""Columns that the second half of an epilogue takes at a time: two of each thread."""


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
    running maximum by more than `drop` (< 0), whichever is higher: neither exceeds lse + drop.
    Of the head's rows only the first `v` (static), or `limit` (traced), are classes.
    """
    n, d = hidden.shape
    v = head.shape[0] if v is None else v
    unit = tiles.tile_n * tiles.cluster
    units = max(ctas // tiles.cluster, 1)
    blocks = pl.cdiv(n, unit)
    v_tiles = pl.cdiv(v, tiles.width)
    block_bytes = unit * d * hidden.dtype.itemsize
    work = schedule.Schedule.served_by_l2(blocks, block_bytes, v_tiles, units)
    cut = work.cut((live + unit - 1) // unit)
    marking = threshold is not None
    names = ["m", "l", "s"]
    names += ["best", "w", "q"] if stats else []
    names += ["kept"] if marking else []
    names += ["squares"] if squares else []
    k_iters = pl.cdiv(d, tiles.tile_d)
    lag = k_iters // 2
    masked = limit is not None or v % tiles.width != 0
    # x is the product itself where that is enough, which saves a multiplication an element. Masked
    # columns may be all that a maximum has seen, and k·LOWEST rounds too coarsely for a difference.
    plain = bias is None and softcap is None and scale > 0.0 and not masked
    k = scale * LOG2E if plain else 1.0

    def body(e_gmem, c_gmem, bias_gmem, thr_gmem, drop_gmem, plan_gmem, *outputs):
        sums_gmem = dict(zip(names, outputs, strict=False))
        marks_gmem = outputs[-1] if marking else None
        cta = lax.axis_index("cta")
        member = lax.axis_index("member") if tiles.cluster > 1 else i32(0)
        cut = schedule.Cut(*(plan_gmem[i] for i in range(4)))

        def items(visit, carry):
            count, item = work.items(cut, cta)

            def one(i, carry):
                partial, block, first, last = item(i)
                row0 = (block * tiles.cluster + member) * tiles.tile_n
                return visit((partial, row0, first, last), carry)

            return lax.fori_loop(0, count, one, carry)

        def every_tile(visit, carry):
            def of_item(item, carry):
                _, row0, first, last = item
                of_tile = lambda vt, c: visit((row0, vt, first, last), c)
                # After the last tile come the stages by which the second consumer lags.
                return lax.fori_loop(first, last + 1 if lag else last, of_tile, carry)

            return items(of_item, carry)

        def length(tile):
            if not lag:
                return i32(k_iters)
            _, vt, first, last = tile
            return jnp.where(vt < last, k_iters, jnp.where(first < last, lag, 0))

        def copy(tile, k, a_stage, b_stage, barrier):
            row0, vt, first, last = tile
            ks = pl.ds(k * tiles.tile_d, tiles.tile_d)
            plgpu.copy_gmem_to_smem(e_gmem.at[pl.ds(row0, tiles.tile_n), ks], a_stage, barrier)
            # What a consumer skips is copied too, from anywhere: a stage has three copies.
            ends, lags = jnp.minimum(vt, last - 1), jnp.where(k < lag, vt - 1, vt)
            lags = jnp.clip(lags, first, last - 1)
            for i, of in enumerate((ends, lags)):
                plgpu.copy_gmem_to_smem(
                    c_gmem.at[pl.ds(of * tiles.width + i * tiles.tile_v, tiles.tile_v), ks],
                    b_stage.at[pl.ds(i * tiles.tile_v, tiles.tile_v)],
                    barrier,
                    collective_axes="member" if tiles.cluster > 1 else None,
                )

        def operands(a, b, wg):
            return a, b.at[pl.ds(wg * tiles.tile_v, tiles.tile_v)].transpose((1, 0))

        stream = Stream(
            steps=tiles.steps,
            a=(tiles.tile_n, tiles.tile_d),
            b=(tiles.width, tiles.tile_d),
            accumulator=(tiles.tile_n, tiles.tile_v),
            length=length,
            copy=copy,
            operands=operands,
            copies=3,
        )

        def consume(consumer, **there):
            wg = consumer.number
            fill = lambda x, dtype=jnp.float32: plgpu.layout_cast(
                jnp.full((tiles.tile_n,), x, dtype), ROW
            )

            below = drop_gmem[0] if marking else None
            end = v if limit is None else plan_gmem[4]

            def of_item(item, ring):
                partial, row0, first, last = item
                thr = None
                if marking:
                    thr_ref = thr_gmem.at[pl.ds(row0, tiles.tile_n)]
                    thr = plgpu.load(thr_ref, layout=ROW, optimized=False) * (LOG2E / k)

                def of_tile(vt, carry):
                    ring, old = carry
                    acc, ring = consumer.multiply((row0, vt, first, last), ring)
                    return ring, update(acc, 2 * vt + wg, row0, thr, below, old)

                start = {name: fill(LOWEST if name == "m" else 0.0) for name in names}
                if stats:
                    start["best"] = fill(0, jnp.int32)
                behind = jnp.where(first < last, lag, 0)
                ring = consumer.skip(wg * behind, ring)
                ring, sums = lax.fori_loop(first, last, of_tile, (ring, start))

                @pl.when(wg == 0)
                def _():
                    combine.give(sums, there)

                ring = consumer.skip((1 - wg) * behind, ring)

                @pl.when(wg == 0)
                def _():
                    plgpu.barrier_wait(there["empty"])

                @pl.when(wg == 1)
                def _():
                    joined = combine.join(combine.take(there), sums, k)
                    for name in names:
                        sums_gmem[name][partial, pl.ds(row0, tiles.tile_n)] = joined[name]

                return ring

            def classes(x, col0, value):
                """x with another value in the columns of the last tile that are no classes."""

                def cut_off(x):
                    column = plgpu.broadcasted_iota(
                        jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA
                    )
                    return jnp.where(column < end - col0, x, value)

                return lax.cond(col0 + tiles.tile_v > end, cut_off, lambda x: x, x)

            def moments(x):
                return {"s": x, "squares": x * x} if squares else {"s": x}

            def summed(x, terms):
                """Each of the terms of x by row, made and added a few columns at a time.

                An epilogue takes as long as its exponentials. In this order the compiler puts all
                else between them; the shuffles that end a sum would hold it up.
                """
                total = {}
                for start in range(0, tiles.tile_v, AT_A_TIME):
                    new = terms(x[:, start : start + AT_A_TIME])
                    total = {name: total[name] + new[name] for name in new} if total else new
                return {name: value.sum(axis=1) for name, value in total.items()}

            def update(acc, tile, row0, thr, below, old):
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
                        x, top, bound, marks_gmem, block, tile, interpret=interpret is not None
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
                    name: combine.relative_to(m, old, name, k) + value
                    for name, value in sums.items()
                }

            items(of_item, i32(0))

        run(
            stream,
            hidden.dtype,
            tiles=every_tile,
            consume=consume,
            cluster=tiles.cluster > 1,
            scratch=combine.scratch(names, tiles.tile_n),
        )

    padded = blocks * unit
    out_type = [
        jax.ShapeDtypeStruct((work.partials, padded), jnp.int32 if x == "best" else jnp.float32)
        for x in names
    ]
    if marking:
        words = v_tiles * marks.words(tiles.width)
        out_type.append(jax.ShapeDtypeStruct((padded // tiles.tile_n, 4, words), jnp.int32))
    bias_in = jnp.zeros((8,), jnp.float32)
    if bias is not None:
        bias_in = jnp.maximum(bias.astype(jnp.float32) * LOG2E, LOWEST)
        bias_in = jnp.pad(bias_in, (0, v_tiles * tiles.width - bias.shape[0]))
    thr_in = jnp.zeros((8,), jnp.float32)
    if marking:
        # An infinite threshold keeps rows without a loss from marking anything.
        thr_in = jnp.pad(threshold, (0, padded - n), constant_values=jnp.inf)
    drop_in = jnp.full(8, drop, jnp.float32) * (LOG2E / k)
    outputs = launch(
        body, out_type, ctas=units, cluster=tiles.cluster, interpret=interpret, name="lsce_forward"
    )(
        hidden,
        head,
        bias_in,
        thr_in,
        drop_in,
        jnp.stack([*cut, i32(v if limit is None else limit)]),
    )

    part = {name: x[:, :n] for name, x in zip(names, outputs, strict=False)}
    parts = work.parts(cut, jnp.arange(blocks, dtype=jnp.int32))
    parts = jnp.broadcast_to(parts[:, None], (blocks, unit)).reshape(padded)[:n]
    valid = jnp.arange(work.partials)[:, None] < parts[None, :]
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
    return Sums(lse, mean_logit, extra, outputs[-1] if marking else None)


def capped(z, softcap: float):
    """tanh(z / softcap) from one exponential and one reciprocal square root.

    The hardware's own tanh is good to 2^-11 only; this form is off by a few float32 roundings of 1,
    so that a capped logit is off by about 1e-7 of the cap.
    """
    root = lax.rsqrt(jnp.exp2(z * (2.0 * LOG2E / softcap)) + 1.0)
    return 1.0 - 2.0 * root * root
