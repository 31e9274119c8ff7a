"""The log-sum-exp with 8-bit operands where a logit says little, and 16-bit where it says much.

All columns go through one pass in e4m3, whose logits are off by 0.16 nats on real activations
(`lsce.sparse.tail` says how they are made). It sums what lies below `LARGE` of a token's
probability, and marks the columns in which any token has more. Those are gathered and computed
again in 16 bits, and what the pass had summed of them is taken out:

    lse = ln( Σ exp z₁₆ over marked columns + Σ exp z₈ over all others )

z₈ of a marked column is made a second time, and summed by the same rule, for there is no room for
what each column had. The mean logit, which smoothing takes, is of rank 1, and exact.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from lsce.backends.hopper.call import Call, in_stages
from lsce.backends.hopper.kernels import marks
from lsce.backends.hopper.kernels.low_sums import low_sums
from lsce.backends.hopper.kernels.lse_forward import LOG2E, LOWEST, Sums, lse_forward
from lsce.problem import cdiv
from lsce.sparse import tail

LARGE = 2.0**-7
"""The probability from which on 8 bits are too few."""
WIDTH = 4096
"""Columns at a time that are computed again."""


def sums(
    call: Call,
    hidden: BFloat16[Array, "rows D"],
    head: BFloat16[Array, "head_rows D"],
    bias: Float[Array, " V"] | None,
    bound: Float[Array, " rows"],
    mean_logit: Float[Array, " rows"],
    live: Int[Array, ""],
    log_epsilon: float | Float[Array, ""] | None,
) -> Sums:
    """The sums of the first `live` tokens, with the marks of a filter where there is one.

    `bound` says what no token's log-sum-exp is less than, and ∞ for rows without a loss.
    """
    v, scale = call.problem.v, call.problem.logit_scale
    s = tail.scales_by_sample(hidden, live, head, v)
    e8 = in_stages(tail.quantised(hidden, s.hidden_mean, s.hidden))
    c8 = in_stages(tail.quantised(head, s.head_mean, s.head))
    column = jnp.sum(head[:v].astype(jnp.float32) * s.hidden_mean[None, :], axis=1) * scale
    if bias is not None:
        column = column + bias.astype(jnp.float32)
    column = jnp.maximum(column * LOG2E, LOWEST)
    centred = hidden.astype(jnp.float32) - s.hidden_mean[None, :]
    row = scale * jnp.dot(centred, s.head_mean, precision="highest")
    # What is large, in nats; the kernel's logits lack their token's own term.
    least, bound = bound, bound + math.log(LARGE)
    options: dict[str, Any] = {
        "tiles": call.tiles.forward,
        "ctas": call.ctas,
        "interpret": call.interpret,
    }
    unit, relative = s.unit * (scale * LOG2E), (bound - row) * LOG2E
    gap = None if log_epsilon is None else jnp.float32((math.log(LARGE) - log_epsilon) * LOG2E)
    found = low_sums(e8, c8, column, unit, relative, gap, live, **options)

    large = marks.of_any_block(found.large, call.tiles.forward.tile_n, live, v)
    place = jnp.cumsum(large, dtype=jnp.int32)
    count = place[-1]
    width = min(WIDTH, cdiv(v, call.tiles.forward.width) * call.tiles.forward.width)
    # The large columns' ids, and after them one that is none.
    ids = jnp.full(cdiv(v, width) * width, head.shape[0], jnp.int32)
    place = jnp.where(large, place - 1, ids.shape[0] + jnp.arange(v))
    ids = ids.at[place].set(jnp.arange(v, dtype=jnp.int32), mode="drop", unique_indices=True)

    def again(number, carry):
        lse, taken = carry
        some = lax.dynamic_slice_in_dim(ids, number * width, width)
        rows_ = lambda x: x.at[some].get(mode="clip")
        high = lse_forward(
            hidden,
            rows_(head),
            None if bias is None else rows_(bias),
            None,
            live,
            scale=scale,
            softcap=None,
            limit=jnp.clip(count - number * width, 0, width),
            **options,
        )
        its_column = column.at[some].get(mode="fill", fill_value=LOWEST)
        low = low_sums(e8, rows_(c8), its_column, unit, relative, None, live, **options)
        return jnp.logaddexp(lse, high.lse), taken + low.small

    nothing = jnp.zeros_like(bound)
    lse, taken = lax.fori_loop(0, cdiv(count, width), again, (nothing - jnp.inf, nothing))
    rest = jnp.maximum(found.small - taken, 0.0)
    lse = jnp.maximum(jnp.logaddexp(lse, bound + jnp.log(rest)), least)
    extra = {}
    if found.below is not None:
        extra["kept"] = 1.0 - found.below * jnp.exp(bound - lse)
    lse, extra = lax.optimization_barrier((lse, extra))
    return Sums(lse, mean_logit, extra, found.marks)
