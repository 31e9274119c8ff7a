"""The loss of each token on Hopper: forward, and a backward that touches what matters."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from lsce import formula
from lsce.hopper import backward, plan
from lsce.hopper.forward import LOG2E, LOWEST, Sums, forward
from lsce.hopper.plan import BLOCK
from lsce.hopper.tiles import Tiles
from lsce.problem import Problem
from lsce.stats import TokenStats

FLAT = 0.25
"""A block of tokens that would lose more than this part of its mass to the filter is kept whole."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call; arrays are padded as `lsce.hopper` says."""

    problem: Problem
    epsilon: float | None
    """The filter; None is exact."""
    tiles: Tiles
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
    vocab_order: Int[Array, " V"] | None
    place: Int[Array, " N"]
    """The row of each token."""
    live: Int[Array, ""]
    sums: Sums
    wants: tuple
    """Three entries, () where hidden, head and bias need a gradient, else None."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(call: Call, hidden, head, bias, labels, vocab_order=None):
    """L_n [N] float32 and TokenStats (or None) for hidden [N, D], head [V, D], labels [N]."""
    live = labels >= 0
    n = jnp.int32(labels.shape[0])
    sums = run_forward(call, hidden, head, bias, None, n)
    return results(call, sums, target_logit_of(call, hidden, head, bias, labels), labels, live)


def _fwd(call: Call, hidden, head, bias, labels, vocab_order=None):
    wants = tuple(None if x is None or not x.perturbed else () for x in (hidden, head, bias))
    hidden, head, labels = hidden.value, head.value, labels.value
    vocab_order = None if vocab_order is None else vocab_order.value
    bias = None if bias is None else bias.value
    n = labels.shape[0]
    rows = -(-n // (2 * BLOCK)) * 2 * BLOCK
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
    target = target_logit_of(call, compact, head, bias, y)
    threshold = None
    if call.epsilon is not None:
        bound = jnp.maximum(lse_bound(call, compact, head, bias, y, live), target)
        threshold = jnp.where(in_use, bound + math.log(call.epsilon), jnp.inf)
    sums = run_forward(call, compact, head, bias, threshold, live)
    spread = lambda x: None if x is None else x[place]
    per_token = Sums(*(spread(x) for x in sums[:-1]), None)
    out = results(call, per_token, target[place], labels, is_live)
    return out, Saved(compact, head, bias, y, vocab_order, place, live, sums, wants)


def _bwd(call: Call, saved: Saved, cotangents):
    if isinstance(cotangents[0], SymbolicZero):
        return None, None, None, None, None
    p, exact = call.problem, call.epsilon is None
    rows, d = saved.hidden.shape
    v, head_rows = p.v, saved.head.shape[0]
    blocks = rows // BLOCK
    live_blocks = (saved.live + BLOCK - 1) // BLOCK
    in_use = jnp.arange(rows) < saved.live
    wants_hidden, wants_head, wants_bias = (want is not None for want in saved.wants)

    by_row = jnp.zeros(rows, jnp.float32).at[saved.place].set(cotangents[0].astype(jnp.float32))
    # 0, or NaN where the cotangent of a token without a loss is NaN (an invalid label).
    poison = jnp.where(in_use, 0.0, by_row * 0.0).sum()
    g = jnp.where(in_use, by_row, 0.0) * p.logit_scale
    lse = jnp.where(in_use, saved.sums.lse, 0.0)
    a = g * formula.softmax_weight(p, lse)
    s = g * p.label_smoothing / v
    # Of the smoothing term −s·J in dz (J the softcap's slope, 1 without one) the part −s·κ is the
    # same for every column and is added as rank 1; a tile of P holds the rest. Exact mode leaves
    # all of it to P where J varies; the filter takes J's mean over the columns for those it skips.
    kappa = jnp.ones_like(g)
    if call.dense_smoothing:
        kappa = jnp.zeros_like(g)
        if not exact:
            mean_square = jnp.where(in_use, saved.sums.mean_square_logit, 0.0)
            kappa = 1.0 - mean_square / p.softcap**2

    tiles = call.tiles.exact if exact else call.tiles.sparse
    slots = tiles.slots_for(blocks, -(-v // tiles.tile_c))
    tile_c, per_chunk = tiles.tile_c, tiles.width // tiles.tile_c
    order = None
    if exact:
        work = plan.whole(blocks, live_blocks, -(-v // tile_c), slots=slots, group=tiles.cluster)
        target = saved.labels
    else:
        kept = jnp.where(in_use, saved.sums.kept, 1.0).reshape(blocks, BLOCK)
        flat = (1.0 - kept.mean(1) > FLAT) & (jnp.arange(blocks) < live_blocks)
        bits = plan.column_bits(saved.sums.marks, call.tiles.forward.tile_n, live_blocks, v)
        bits = plan.with_labels(bits, saved.labels, flat)
        columns, active = plan.columns(bits, saved.vocab_order, blocks, tile_c)
        work = plan.work(active, tiles=per_chunk, slots=slots, group=tiles.cluster)
        target = jnp.where(saved.labels >= 0, columns.position[saved.labels], -1)
        order = jnp.pad(columns.order, (0, tiles.width), constant_values=head_rows)

    # dL/dC of a column that no tile holds: the smoothing alone, the same row for all of them.
    padded_d = max(-(-d // tile) * tile for tile in (tiles.hidden_d, tiles.head_d))
    constant = jnp.zeros(padded_d, jnp.float32)
    if p.label_smoothing > 0.0 and wants_head:
        row = jnp.dot(-s * kappa, saved.hidden.astype(jnp.float32), precision="highest")
        constant = constant.at[:d].set(row)
    constant = constant + poison
    constant_bias = poison - (s * kappa).sum() / p.logit_scale
    bias = None
    if saved.bias is not None:
        bias = jnp.maximum(saved.bias.astype(jnp.float32), LOWEST)

    vectors = backward.Vectors(lse * LOG2E, a, g * (1.0 - p.label_smoothing), s, kappa, target)
    options = {"tiles": tiles, "ctas": call.ctas, "interpret": call.interpret}
    p_ref = jax.new_ref(lax.empty((slots * BLOCK, tile_c), saved.hidden.dtype))
    kept_ref = jax.new_ref(lax.empty((slots * BLOCK,), jnp.float32))
    dh_ref = jax.new_ref(jnp.zeros((rows, padded_d), jnp.float32)) if wants_hidden else None

    def products(chunk, head, bias, dc_ref):
        """P of a chunk and what follows from it; `head` is the whole head or the chunk's rows."""
        gathered = order is not None
        at = jnp.asarray(chunk, jnp.int32).reshape(1)
        backward.probabilities(
            saved.hidden,
            head,
            bias,
            vectors,
            work,
            at,
            p_ref,
            kept_ref,
            gathered=gathered,
            scale=p.logit_scale,
            softcap=p.softcap,
            smooth=call.dense_smoothing,
            v=v,
            **options,
        )
        if wants_hidden:
            backward.accumulate_hidden(
                p_ref, head, work, at, dh_ref, gathered=gathered, dense=exact, **options
            )
        if wants_head:
            backward.head_gradient(
                p_ref, saved.hidden, work, at, constant, dc_ref, gathered=gathered, **options
            )

    def bias_part(chunk, most):
        """Σ_n of a chunk's P by column, float32 [most · tile_c], and how many columns it has."""
        t = work.first_tile[chunk] + jnp.arange(most)
        mine = t < work.first_tile[chunk + 1]
        t = jnp.minimum(t, work.tile_slot.shape[0] - 1)
        first, slot = work.tile_slot[t][:, None], jnp.arange(slots)[None, :]
        owns = (slot >= first) & (slot < first + work.of_tile_count[t][:, None]) & mine[:, None]
        sums = p_ref[...].reshape(slots, BLOCK, tile_c).sum(1, dtype=jnp.float32)
        # A product and not a scatter, whose order of adding nobody fixes; slots in no tile of the
        # chunk hold whatever was there.
        sums = jnp.where(owns.any(0)[:, None], sums, 0.0)
        return jnp.dot(owns.astype(jnp.float32), sums, precision="highest").reshape(-1)

    def mass(chunk):
        """The probability that a chunk's tiles hold, by row."""
        first, after = work.first_of_block[chunk], work.first_of_block[chunk + 1]
        at = first[:, None] + jnp.arange(per_chunk)[None, :]
        within = (at < after[:, None])[..., None]
        at = jnp.minimum(at, work.of_block.shape[1] - 1)
        slot = jnp.take_along_axis(work.of_block_slot, at, axis=1)
        by_tile = kept_ref[...].reshape(slots, BLOCK)[jnp.clip(slot, 0, slots - 1)]
        return jnp.where(within, by_tile, 0.0).sum(1).reshape(rows)

    dhead = dbias = None
    if exact:
        per_chunk = slots // blocks
        dc_ref = jax.new_ref(lax.empty(saved.head.shape, saved.head.dtype)) if wants_head else None
        padded = None if bias is None else jnp.pad(bias, (0, -v % tile_c))

        def body(chunk, dbias):
            products(chunk, saved.head, padded, dc_ref)
            if wants_bias:
                part = bias_part(chunk, per_chunk)
                dbias = lax.dynamic_update_slice(dbias, part, (chunk * per_chunk * tile_c,))
            return dbias

        chunks = work.first_tile.shape[0] - 1
        dbias = jnp.zeros(chunks * per_chunk * tile_c) if wants_bias else None
        # A static number of chunks: XLA then looks at no condition between them.
        dbias = lax.fori_loop(0, chunks, body, dbias)
        dhead = dc_ref[...] if wants_head else None
    else:
        if wants_head:
            row = constant[:d].astype(saved.head.dtype)
            dhead = jnp.broadcast_to(row[None, :], saved.head.shape)

        def body(chunk, carry):
            dhead, dbias, kept = carry
            first = work.first_tile[chunk] * tile_c
            ids = lax.dynamic_slice(order, (first,), (tiles.width,))
            part_ref = jax.new_ref(saved.head.at[ids].get(mode="clip"))
            # The gathered rows of the head have done their work when dC takes their place.
            products(
                chunk, part_ref, None if bias is None else bias.at[ids].get(mode="clip"), part_ref
            )
            count = work.first_tile[chunk + 1] * tile_c - first
            ids = jnp.where(jnp.arange(tiles.width) < count, ids, head_rows)
            if wants_head:
                dhead = dhead.at[ids].set(part_ref[...], mode="drop", unique_indices=True)
            if wants_bias:
                dbias = dbias.at[ids].set(bias_part(chunk, per_chunk), mode="drop")
            return dhead, dbias, kept + mass(chunk) if wants_hidden else kept

        dbias = jnp.zeros(v, jnp.float32) if wants_bias else None
        dhead, dbias, kept = lax.fori_loop(
            0, work.chunks, body, (dhead, dbias, jnp.zeros(rows, jnp.float32))
        )

    dhidden = None
    if wants_hidden:
        dhidden = dh_ref[...][:, :d]
        # What acts on every column alike acts through the head's mean row: the smoothing, and as a
        # stand-in for the rows it skipped, the mass that the filter dropped.
        pull = -s * kappa * v
        if not exact:
            pull = pull + a * jnp.clip(1.0 - kept, 0.0, 1.0)
        if not exact or p.label_smoothing > 0.0:
            center = jnp.mean(saved.head[:v], axis=0, dtype=jnp.float32)
            dhidden = dhidden + pull[:, None] * center[None, :]
        dhidden = (dhidden + poison)[saved.place].astype(saved.hidden.dtype)
    if wants_bias:
        dbias = (dbias[:v] / p.logit_scale + constant_bias).astype(saved.bias.dtype)
    return dhidden, dhead, dbias, None, None


token_losses.defvjp(_fwd, _bwd, symbolic_zeros=True)


def run_forward(call: Call, hidden, head, bias, threshold, live) -> Sums:
    p = call.problem
    return forward(
        hidden,
        head,
        bias,
        threshold,
        live,
        tiles=call.tiles.forward,
        scale=p.logit_scale,
        softcap=p.softcap,
        drop=math.log(call.epsilon) if threshold is not None else 0.0,
        stats=p.return_stats,
        squares=threshold is not None and call.dense_smoothing,
        v=p.v,
        ctas=call.ctas,
        interpret=call.interpret,
    )


def target_logit_of(call: Call, hidden, head, bias, labels):
    y = jnp.maximum(labels, 0)
    z = jnp.sum(hidden.astype(jnp.float32) * head[y].astype(jnp.float32), axis=1)
    z = z * call.problem.logit_scale
    if bias is not None:
        z = z + bias[y].astype(jnp.float32)
    if call.problem.softcap is not None:
        z = call.problem.softcap * jnp.tanh(z / call.problem.softcap)
    return z


def lse_bound(call: Call, hidden, head, bias, labels, live):
    """A lower bound of the log-sum-exp: the sum over the batch's own most frequent labels."""
    y = jnp.sort(labels)
    left = jnp.searchsorted(y, y, side="left")
    count = jnp.searchsorted(y, y, side="right") - left
    first = (left == jnp.arange(y.shape[0])) & (y >= 0)
    hot = min(call.tiles.hot, y.shape[0])
    key = jnp.where(first, -count, 1)
    ids = y[jnp.argsort(key, stable=True)[:hot]]
    limit = jnp.minimum(first.sum(dtype=jnp.int32), hot)
    ids = jnp.maximum(ids, 0)
    p = call.problem
    return forward(
        hidden,
        head[ids],
        None if bias is None else bias[ids],
        None,
        live,
        tiles=call.tiles.forward,
        scale=p.logit_scale,
        softcap=p.softcap,
        limit=limit,
        ctas=call.ctas,
        interpret=call.interpret,
    ).lse


def results(call: Call, sums: Sums, target, labels, live):
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
        loss=loss,
        lse=mask(lse),
        target_logit=mask(target),
        mean_logit=mask(sums.mean_logit),
        confidence=mask(jnp.exp(jnp.minimum(sums.top - lse, 0.0))),
        prediction=prediction,
        correct=live & (sums.prediction == labels),
        entropy=mask(jnp.maximum(sums.entropy, 0.0)),
        sum_p_squared=mask(sums.sum_p_squared),
    )
    return loss, stats
