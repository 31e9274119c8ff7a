"""The loss of each token on Hopper: the pass forward, and what it leaves behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce import formula
from lsce.backends import Arrays, Outputs
from lsce.backends.hopper.gradients import Call, Saved
from lsce.backends.hopper.kernels.lse_forward import Sums, forward
from lsce.backends.hopper.tiles import BLOCK
from lsce.sparse import filter as filtering
from lsce.stats import TokenStats


def losses(call: Call, arrays: Arrays) -> Outputs:
    """L_n [N] float32 and TokenStats (or None)."""
    hidden, head, labels, bias, _ = arrays
    sums = run_forward(call, hidden, head, bias, None, jnp.int32(labels.shape[0]))
    return results(call, sums, target_logit(call, hidden, head, bias, labels), labels, labels >= 0)


def kept(call: Call, arrays: Arrays) -> tuple[Outputs, Saved]:
    """The same, with what the backward pass needs."""
    hidden, head, labels, bias, vocab_order = arrays
    threshold, drop = None, 0.0
    # A cluster of the products' kernels takes two blocks.
    unit = max(2, call.tiles.sparse.group) * BLOCK
    if call.epsilon is None:
        rows = arrange(hidden, labels, places(labels), unit)
        target = target_logit(call, rows.hidden, head, bias, rows.labels)
    else:
        hot = hot_sums(call, hidden, head, bias, labels, stats=True)
        rows = arrange(hidden, labels, places(labels, hot), unit)
        target = target_logit(call, rows.hidden, head, bias, rows.labels)
        bound = jnp.zeros_like(target).at[rows.place].set(hot.lse, unique_indices=True)
        drop = filtering.log_epsilon(call.epsilon, rows.live, call.problem.v)
        bound = jnp.maximum(bound, target) + drop
        # An infinite threshold keeps rows without a loss from marking anything.
        threshold = jnp.where(rows.in_use, bound, jnp.inf)
    sums = run_forward(call, rows.hidden, head, bias, threshold, rows.live, drop=drop)
    of_token = jax.tree.map(lambda x: x[rows.place], sums._replace(marks=None))
    out = results(call, of_token, target[rows.place], labels, labels >= 0)
    saved = Saved(rows.hidden, head, bias, rows.labels, vocab_order, rows.place, rows.live, sums)
    return out, saved


class Rows(NamedTuple):
    """The tokens with a loss first, padded with zeros to whole groups of blocks.

    Blocks of tokens without a loss are never visited, and a NaN in their hidden state goes nowhere.
    """

    hidden: Float[Array, "rows D"]
    labels: Int[Array, " rows"]
    in_use: Array
    place: Int[Array, " N"]
    """The row of each token."""
    live: Int[Array, ""]


def places(labels: Int[Array, " N"], hot: Sums | None = None) -> Int[Array, " N"]:
    """The row that each token gets: those with a loss first.

    With the sums over the hot columns, tokens that spread their probability about as widely (by
    nats of entropy) and have the same class on top become neighbours, so that a block of them needs
    fewer columns, and the columns of the widest are not every block's. Active pairs of Gemma 3
    270M's activations: −16%, of SmolLM2 135M's: −23% (benchmarks/NOTES.md).
    """
    has_loss = labels >= 0
    index = jnp.arange(labels.shape[0], dtype=jnp.int32)
    if hot is None:
        before = jnp.cumsum(has_loss, dtype=jnp.int32)
        return jnp.where(has_loss, before - 1, before[-1:] + index - before)
    entropy = hot.extra["entropy"]
    width = jnp.where(entropy < 15.0, entropy, 15.0).astype(jnp.uint32)  # NaN too
    key = (width << 27) | hot.extra["prediction"].astype(jnp.uint32)
    key = jnp.where(has_loss, key, jnp.uint32(0xFFFFFFFF))
    order = lax.sort((key, index), num_keys=1)[1]
    return jnp.zeros_like(index).at[order].set(index, unique_indices=True)


def arrange(
    hidden: Float[Array, "N D"], labels: Int[Array, " N"], place: Int[Array, " N"], unit: int
) -> Rows:
    """The tokens in their places, in a multiple of `unit` rows."""
    n = labels.shape[0]
    rows = -(-n // unit) * unit
    live = (labels >= 0).sum(dtype=jnp.int32)
    index = jnp.arange(n, dtype=jnp.int32)
    at = jnp.full(rows, n, jnp.int32).at[place].set(index, unique_indices=True)
    in_use = jnp.arange(rows) < live
    hidden = jnp.where(in_use[:, None], hidden.at[at].get(mode="fill", fill_value=0), 0)
    labels = jnp.where(in_use, labels.at[at].get(mode="fill", fill_value=-1), -1)
    return Rows(hidden, labels, in_use, place, live)


def run_forward(call: Call, hidden, head, bias, threshold, live, **changes: Any) -> Sums:
    """The forward kernel with the call's options."""
    p = call.problem
    options = {
        "tiles": call.tiles.forward,
        "scale": p.logit_scale,
        "softcap": p.softcap,
        "stats": p.return_stats,
        "squares": threshold is not None and call.dense_smoothing,
        "v": p.v,
        "ctas": call.ctas,
        "interpret": call.interpret,
    }
    return forward(hidden, head, bias, threshold, live, **(options | changes))


def target_logit(call: Call, hidden, head, bias, labels) -> Float[Array, " N"]:
    """z_y of each token, by gathering its label's row of the head."""
    y = jnp.maximum(labels, 0)
    z = jnp.sum(hidden.astype(jnp.float32) * head[y].astype(jnp.float32), axis=1)
    z = z * call.problem.logit_scale
    if bias is not None:
        z = z + bias[y].astype(jnp.float32)
    softcap = call.problem.softcap
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def hot_sums(call: Call, hidden, head, bias, labels, *, stats: bool) -> Sums:
    """The sums over the batch's own most frequent labels only.

    The lse is a lower bound of that over all columns. They hold most of the probability of real
    text, at under a hundredth of the forward's price. A prediction is a place among them.
    """
    n = labels.shape[0]
    hot = min(call.tiles.hot, n)
    ids, limit = most_frequent(labels, call.problem.v, hot)
    bias = None if bias is None else bias[ids]
    return run_forward(
        call, hidden, head[ids], bias, None, jnp.int32(n), limit=limit, v=hot, stats=stats
    )


def most_frequent(
    labels: Int[Array, " rows"], v: int, most: int
) -> tuple[Int[Array, " most"], Int[Array, ""]]:
    """The `most` labels that occur most often, 0 after the last, and how many they are."""
    # One integer to sort by: first the count, up to what has room beside the label, then the label.
    room = v.bit_length()
    top = (1 << 32 - room) - 1
    safe = jnp.maximum(labels, 0)
    count = jnp.zeros(v, jnp.uint32).at[safe].add(jnp.uint32(1))[safe]
    key = (jnp.uint32(top) - jnp.minimum(count, jnp.uint32(top))) << room
    key = jnp.where(labels >= 0, key | safe.astype(jnp.uint32), jnp.uint32(0xFFFFFFFF))
    key = jnp.sort(key)
    fresh = jnp.diff(key, prepend=~key[:1]) != 0
    fresh &= key != jnp.uint32(0xFFFFFFFF)
    rank = jnp.cumsum(fresh, dtype=jnp.int32) - 1
    place = jnp.where(fresh, rank, most + jnp.arange(key.shape[0]))
    label = (key & jnp.uint32((1 << room) - 1)).astype(jnp.int32)
    ids = jnp.zeros(most, jnp.int32).at[place].set(label, mode="drop", unique_indices=True)
    return ids, jnp.minimum(fresh.sum(dtype=jnp.int32), most)


def results(
    call: Call, sums: Sums, target: Float[Array, " N"], labels: Int[Array, " N"], live: Array
) -> tuple[Float[Array, " N"], TokenStats | None]:
    """Losses and statistics of N tokens, zero where there is no loss."""
    p = call.problem
    # The target is one of the terms of the sum: rounding must not put it above.
    lse = jnp.maximum(sums.lse, target)
    loss = jnp.where(live, formula.token_loss(p, lse, target, sums.mean_logit), 0.0)
    if not p.return_stats:
        return loss, None
    extra = sums.extra
    stats = TokenStats(
        loss=loss,
        lse=lse,
        target_logit=target,
        mean_logit=sums.mean_logit,
        confidence=extra["confidence"],
        prediction=extra["prediction"],
        correct=extra["prediction"] == labels,
        entropy=jnp.maximum(extra["entropy"], 0.0),
        sum_p_squared=extra["sum_p_squared"],
        below_filter=jnp.maximum(1.0 - extra["kept"], 0.0) if "kept" in extra else 0.0 * lse,
    )
    return loss, stats.only(live)
