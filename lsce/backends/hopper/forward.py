"""The forward pass: the loss and the statistics of each token, and what the backward pass needs."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce import formula
from lsce.backends import Arrays, Outputs
from lsce.backends.hopper import eight_bits
from lsce.backends.hopper.call import Call
from lsce.backends.hopper.kernels.lse_forward import Sums, lse_forward
from lsce.sparse import filter as filtering
from lsce.sparse.bound import most_frequent, of_mean_logit
from lsce.sparse.tokens import BLOCK, arrange, order_tokens
from lsce.stats import TokenStats


class Saved(NamedTuple):
    """What the backward needs of the forward; tokens with a loss come first."""

    hidden: Float[Array, "rows D"]
    head: Float[Array, "head_rows D"]
    bias: Float[Array, " V"] | None
    labels: Int[Array, " rows"]
    vocab_order: Int[Array, " V"] | None
    row_of_token: Int[Array, " N"]
    live: Int[Array, ""]
    target: Float[Array, " rows"]
    """The target's logit."""
    sums: Sums


def losses(call: Call, arrays: Arrays) -> Outputs:
    """L_n [N] float32 and TokenStats (or None)."""
    hidden, head, labels, bias, _ = arrays
    if call.low:
        # Tokens with a loss alone make the scales of 8 bits, here and where there is a derivative.
        return kept(dataclasses.replace(call, epsilon=None), arrays)[0]
    sums = run_forward(call, hidden, head, bias, None, jnp.int32(labels.shape[0]))
    target = target_logit(call, hidden, head, bias, labels)
    return results(call, sums, target, labels, labels >= 0)


def kept(call: Call, arrays: Arrays) -> tuple[Outputs, Saved]:
    """The same, with what the backward pass needs."""
    hidden, head, labels, bias, vocab_order = arrays
    # A cluster of the products' kernels takes two blocks.
    unit = max(2, call.tiles.sparse.group) * BLOCK
    if call.epsilon is None and not call.low:
        rows = arrange(hidden, labels, order_tokens(labels), unit)
        target = target_logit(call, rows.hidden, head, bias, rows.labels)
        sums = run_forward(call, rows.hidden, head, bias, None, rows.live)
    else:
        hot = hot_sums(call, hidden, head, bias, labels, stats=True)
        row_of_token = order_tokens(labels, hot.extra["entropy"], hot.extra["prediction"])
        rows = arrange(hidden, labels, row_of_token, unit)
        target = target_logit(call, rows.hidden, head, bias, rows.labels)
        bound = jnp.zeros_like(target).at[rows.row_of_token].set(hot.lse, unique_indices=True)
        bound = jnp.maximum(bound, target)
        drop: Any = None
        if call.epsilon is not None:
            drop = filtering.log_epsilon(call.epsilon, rows.live, call.problem.v)
        if call.low:
            sums = low_sums(call, rows.hidden, head, bias, bound, rows.in_use, rows.live, drop)
        else:
            capless = call.tail and call.problem.softcap is None and bias is None
            below = drop
            if call.tail_where_flat or capless:
                mean = _mean_bound(call, rows.hidden, head)
                if call.tail_where_flat:
                    # The blocks of flat tokens are computed in 8 bits or kept whole. Below the
                    # smaller ε of a filter each marks some column, all of them nearly all.
                    high = filtering.log_epsilon("fp8", rows.live, call.problem.v)
                    below = jnp.where(mean > bound, high, drop)
                bound = jnp.maximum(bound, mean)
            # An infinite threshold keeps rows without a loss from marking anything.
            threshold = jnp.where(rows.in_use, bound + below, jnp.inf)
            sums = run_forward(call, rows.hidden, head, bias, threshold, rows.live, drop=drop)
    of_token = jax.tree.map(lambda x: x[rows.row_of_token], sums._replace(marks=None))
    out = results(call, of_token, target[rows.row_of_token], labels, labels >= 0)
    # Where a scan keeps them they are copied to their place, see `call.padded`.
    sums = sums._replace(marks=lax.optimization_barrier(sums.marks))
    saved = Saved(
        rows.hidden,
        head,
        bias,
        rows.labels,
        vocab_order,
        rows.row_of_token,
        rows.live,
        target,
        sums,
    )
    return out, saved


def low_sums(call: Call, hidden, head, bias, bound, in_use, live, drop) -> Sums:
    """The sums with 8-bit operands where that is enough, from what the lse is known to be above."""
    mean = mean_logit(call, hidden, head, bias)
    bound = jnp.maximum(bound, of_mean_logit(mean, call.problem.v))
    bound = jnp.where(in_use, bound, jnp.inf)
    return eight_bits.sums(call, hidden, head, bias, bound, mean, live, drop)


def _mean_bound(call: Call, hidden, head) -> Float[Array, " rows"]:
    """The bound of the lse by the mean logit, which flat tokens need: of them little else is known,
    and what they may keep then is everything."""
    return of_mean_logit(mean_logit(call, hidden, head, None), call.problem.v)


def mean_logit(call: Call, hidden, head, bias) -> Float[Array, " rows"]:
    """Σ_v z_v / V where there is no cap, through the head's mean row."""
    center = jnp.mean(head[: call.problem.v], axis=0, dtype=jnp.float32)
    mean = jnp.dot(hidden.astype(jnp.float32), center, precision="highest")
    mean = mean * call.problem.logit_scale
    return mean if bias is None else mean + jnp.mean(bias.astype(jnp.float32))


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
    return lse_forward(hidden, head, bias, threshold, live, **(options | changes))


def target_logit(call: Call, hidden, head, bias, labels) -> Float[Array, " N"]:
    """z_y of each token, by gathering its label's row of the head."""
    y = jnp.maximum(labels, 0)
    z = jnp.sum(hidden.astype(jnp.float32) * head[y].astype(jnp.float32), axis=1)
    z = z * call.problem.logit_scale
    if bias is not None:
        z = z + bias[y].astype(jnp.float32)
    return formula.capped(call.problem, z)


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
        entropy=extra["entropy"],
        sum_p_squared=extra["sum_p_squared"],
        below_filter=jnp.maximum(1.0 - extra["kept"], 0.0) if "kept" in extra else 0.0 * lse,
    )
    return loss, stats.only(live)
