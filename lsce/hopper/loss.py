"""The loss of each token on Hopper: forward, and a backward that touches what matters."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce import formula
from lsce.hopper import backward, plan
from lsce.hopper.forward import LOG2E, ForwardTiles, Sums, forward
from lsce.hopper.plan import BLOCK
from lsce.problem import Problem
from lsce.stats import TokenStats


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call."""

    problem: Problem
    epsilon: float | None
    """The filter; None is exact."""
    forward: ForwardTiles
    backward: backward.BackwardTiles
    hot: int
    """Columns of the pass that bounds the log-sum-exp before the forward."""
    ctas: int
    interpret: Any = None

    @property
    def dense_smoothing(self) -> bool:
        """Smoothing is of rank 1, except under a softcap."""
        return self.problem.softcap is not None and self.problem.label_smoothing > 0.0


class Saved(NamedTuple):
    """What the backward needs of the forward; rows are compacted: tokens with a loss come first."""

    hidden: Float[Array, "rows D"]
    head: Float[Array, "V D"]
    bias: Float[Array, " V"] | None
    labels: Int[Array, " rows"]
    place: Int[Array, " N"]
    """The row of each token."""
    live: Int[Array, ""]
    sums: Sums
    wants: tuple
    """Three entries, () where hidden, head and bias need a gradient, else None."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(call: Call, hidden, head, bias, labels):
    """L_n [N] float32 and TokenStats (or None) for hidden [N, D], head [V, D], labels [N]."""
    live = labels >= 0
    n = jnp.int32(labels.shape[0])
    sums = _forward(call, hidden, head, bias, None, n)
    return _results(call, sums, _target_logit(call, hidden, head, bias, labels), labels, live)


def _fwd(call: Call, hidden, head, bias, labels):
    wants = tuple(None if x is None or not x.perturbed else () for x in (hidden, head, bias))
    hidden, head, labels = hidden.value, head.value, labels.value
    bias = None if bias is None else bias.value
    n = labels.shape[0]
    rows = -(-n // BLOCK) * BLOCK
    is_live = labels >= 0
    live = is_live.sum(dtype=jnp.int32)
    # Tokens without a loss go last: whole blocks of them are never visited, and a NaN in their
    # hidden state goes nowhere.
    order = jnp.argsort(~is_live, stable=True)
    place = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    at = jnp.pad(order, (0, rows - n), constant_values=n)
    in_use = jnp.arange(rows) < live
    compact = jnp.where(in_use[:, None], hidden.at[at].get(mode="fill", fill_value=0), 0)
    y = jnp.where(in_use, labels.at[at].get(mode="fill", fill_value=-1), -1)
    target = _target_logit(call, compact, head, bias, y)
    threshold = None
    if call.epsilon is not None:
        bound = jnp.maximum(_lse_bound(call, compact, head, bias, y, live), target)
        threshold = jnp.where(in_use, bound + math.log(call.epsilon), jnp.inf)
    sums = _forward(call, compact, head, bias, threshold, live)
    spread = lambda x: None if x is None else x[place]
    per_token = Sums(*(spread(x) for x in sums[:-1]), None)
    out = _results(call, per_token, target[place], labels, is_live)
    return out, Saved(compact, head, bias, y, place, live, sums, wants)


def _bwd(call: Call, saved: Saved, cotangents):
    p = call.problem
    g = cotangents[0]
    if not isinstance(g, jax.Array) and type(g).__name__ == "SymbolicZero":
        return tuple(None for _ in range(4))
    n = saved.place.shape[0]
    rows, d = saved.hidden.shape
    blocks = rows // BLOCK
    in_use = jnp.arange(rows) < saved.live
    by_row = jnp.zeros(rows, jnp.float32).at[saved.place].set(g.astype(jnp.float32))
    # 0, or NaN where the cotangent of a token without a loss is NaN (an invalid label).
    poison = jnp.where(in_use, 0.0, by_row * 0.0).sum()
    g = jnp.where(in_use, by_row, 0.0)
    lse = jnp.where(in_use, saved.sums.lse, 0.0)
    exact = call.epsilon is None
    a = g * formula.softmax_weight(p, lse) * p.logit_scale
    b = g * (1.0 - p.label_smoothing) * p.logit_scale
    s = g * p.label_smoothing / p.v * p.logit_scale
    if not call.dense_smoothing:
        kappa = jnp.ones_like(g)
    elif exact:
        kappa = jnp.zeros_like(g)
    else:
        mean_square = jnp.where(in_use, saved.sums.mean_square_logit, 0.0)
        kappa = 1.0 - mean_square / p.softcap**2
    v = saved.head.shape[0]
    tiles = call.backward
    width = tiles.width
    if exact:
        columns = None
        lists = plan.dense(blocks, (saved.live + BLOCK - 1) // BLOCK, width // tiles.tile_c)
        chunks = -(-v // width)
        target = saved.labels
    else:
        kept = jnp.where(in_use, saved.sums.kept, 1.0).reshape(blocks, BLOCK)
        whole = 1.0 - kept.mean(1) > FLAT
        bits = plan.column_bits(saved.sums.marks, call.forward.tile_n, v)
        bits = bits[:, :v]
        bits = plan.with_labels(bits, saved.labels, whole)
        columns, active = plan.columns(bits, blocks, width, tiles.tile_c)
        lists = plan.lists(active)
        chunks = columns.chunks
        target = jnp.where(saved.labels >= 0, columns.position[saved.labels], -1)
    needs_hidden, needs_head, needs_bias = (w is not None for w in saved.wants)
    vectors = backward.Vectors(lse * LOG2E, a, b, s, kappa, target)
    d_tiles = -(-d // tiles.tile_d) * tiles.tile_d
    # dL/dC of a column nobody kept: the smoothing term alone, the same for all of them.
    constant = jnp.zeros(d_tiles, jnp.float32)
    if p.label_smoothing > 0.0 and needs_head:
        weight = -s * kappa
        row = jnp.dot(weight, saved.hidden.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        constant = constant.at[:d].set(row)
    constant = constant + poison
    dh = jax.new_ref(jnp.zeros((rows, d_tiles), jnp.float32))
    scratch = jax.new_ref(lax.empty((rows, width), saved.hidden.dtype))
    kept_ref = jax.new_ref(jnp.zeros((width // tiles.tile_c, rows), jnp.float32))
    bias = saved.bias
    if bias is not None:
        pad = chunks_pad = -(-v // width) * width - v
        bias = jnp.pad(bias.astype(jnp.float32), (0, chunks_pad))
    dhead_dtype = saved.head.dtype
    options = dict(tiles=tiles, ctas=call.ctas, interpret=call.interpret)

    def one(chunk, head_part, bias_part, dc_ref, gathered):
        where = jnp.stack([jnp.int32(chunk), jnp.int32(0) if exact else jnp.int32(chunk)])
        backward.probabilities(
            saved.hidden, head_part, bias_part, vectors, lists, where, scratch, kept_ref,
            gathered=gathered, scale=p.logit_scale, softcap=p.softcap, smooth=call.dense_smoothing,
            v=v, **options,
        )
        if needs_hidden:
            backward.accumulate_hidden(scratch, head_part, lists, where, dh, gathered=gathered, **options)
        if needs_head:
            backward.head_gradient(scratch, saved.hidden, lists, where, constant, dc_ref, gathered=gathered, **options)

    dbias = jnp.zeros(v, jnp.float32) if needs_bias else None
    dc = None
    if exact:
        dc_ref = jax.new_ref(lax.empty((v, d), dhead_dtype)) if needs_head else None

        def body(chunk, dbias):
            one(chunk, saved.head, bias, dc_ref, False)
            return dbias

        dbias = lax.fori_loop(0, chunks, body, dbias)
        dc = dc_ref[...] if needs_head else None
    else:
        part_ref = jax.new_ref(lax.empty((width, d), dhead_dtype)) if needs_head else None
        if needs_head:
            dc = jnp.broadcast_to(constant[:d].astype(dhead_dtype), (v, d))

        def body(chunk, carry):
            dc, dbias = carry
            ids = lax.dynamic_slice(columns.order, (chunk * width,), (width,))
            head_part = saved.head.at[ids].get(mode="clip")
            bias_part = None if bias is None else saved.bias.astype(jnp.float32).at[ids].get(mode="clip")
            one(chunk, head_part, bias_part, part_ref, True)
            if needs_head:
                dc = dc.at[ids].set(part_ref[...], mode="drop", unique_indices=True)
            return dc, dbias

        dc, dbias = lax.fori_loop(0, chunks, body, (dc, dbias))
    dhidden = None
    if needs_hidden:
        total = dh[...][:, :d]
        if p.label_smoothing > 0.0:
            center = jnp.mean(saved.head, axis=0, dtype=jnp.float32)
            total = total - (s * kappa * v)[:, None] * center
        dhidden = (total + poison)[saved.place].astype(saved.hidden.dtype)
    if needs_bias:
        raise NotImplementedError
    return dhidden, dc, dbias, None


token_losses.defvjp(_fwd, _bwd, symbolic_zeros=True)

FLAT = 0.25
"""A block of tokens that would drop more of its mass than this is computed whole."""


def _forward(call: Call, hidden, head, bias, threshold, live) -> Sums:
    p = call.problem
    return forward(
        hidden, head, bias, threshold, live,
        tiles=call.forward, scale=p.logit_scale, softcap=p.softcap,
        drop=math.log(call.epsilon) if threshold is not None else 0.0,
        stats=p.return_stats, squares=threshold is not None and call.dense_smoothing,
        ctas=call.ctas, interpret=call.interpret,
    )


def _target_logit(call: Call, hidden, head, bias, labels):
    y = jnp.maximum(labels, 0)
    z = jnp.sum(hidden.astype(jnp.float32) * head[y].astype(jnp.float32), axis=1)
    z = z * call.problem.logit_scale
    if bias is not None:
        z = z + bias[y].astype(jnp.float32)
    if call.problem.softcap is not None:
        z = call.problem.softcap * jnp.tanh(z / call.problem.softcap)
    return z


def _lse_bound(call: Call, hidden, head, bias, labels, live):
    """A lower bound of the log-sum-exp: the sum over the batch's own most frequent labels."""
    y = jnp.sort(labels)
    left = jnp.searchsorted(y, y, side="left")
    count = jnp.searchsorted(y, y, side="right") - left
    first = (left == jnp.arange(y.shape[0])) & (y >= 0)
    hot = min(call.hot, y.shape[0])
    key = jnp.where(first, -count, 1)
    ids = y[jnp.argsort(key, stable=True)[:hot]]
    limit = jnp.minimum(first.sum(dtype=jnp.int32), hot)
    ids = jnp.maximum(ids, 0)
    p = call.problem
    return forward(
        hidden, head[ids], None if bias is None else bias[ids], None, live,
        tiles=call.forward, scale=p.logit_scale, softcap=p.softcap, limit=limit,
        ctas=call.ctas, interpret=call.interpret,
    ).lse


def _results(call: Call, sums: Sums, target, labels, live):
    """Losses and statistics of N tokens, zero where there is no loss."""
    p = call.problem
    mask = lambda x: jnp.where(live, x, jnp.zeros((), x.dtype))
    # The target is one of the terms of the sum: rounding must not put it above.
    lse = jnp.maximum(sums.lse, target)
    loss = mask(formula.token_loss(p, lse, target, sums.mean_logit))
    if not p.return_stats:
        return loss, None
    prediction = mask(sums.prediction)
    stats = TokenStats(
        loss=loss, lse=mask(lse), target_logit=mask(target), mean_logit=mask(sums.mean_logit),
        confidence=mask(jnp.exp(jnp.minimum(sums.top - lse, 0.0))), prediction=prediction,
        correct=live & (sums.prediction == labels), entropy=mask(jnp.maximum(sums.entropy, 0.0)),
        sum_p_squared=mask(sums.sum_p_squared),
    )
    return loss, stats
