"""A token's target: its logit, and what rounding does to its entry of P.

The target's entry, about p_y − (1−β), is the largest of its row unless the token is as good as
known, and P holds it in 16 bits. Of dE's error that is the largest part (of columns like Gemma's
.0022 of .0031, the result's own rounding being .0017; benchmarks/notes/exact-and-fused.md). What
was cut off is one number a token, so it is given back to dE along the target's row of the head.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from lsce import formula
from lsce.backends.hopper.call import Call


def logit(call: Call, hidden, head, bias, labels: Int[Array, " N"]) -> Float[Array, " N"]:
    """z_y of each token, by gathering its label's row of the head."""
    y = jnp.maximum(labels, 0)
    z = jnp.sum(hidden.astype(jnp.float32) * head[y].astype(jnp.float32), axis=1)
    z = z * call.problem.logit_scale
    if bias is not None:
        z = z + bias[y].astype(jnp.float32)
    return formula.capped(call.problem, z)


def rounded_off(entry: Float[Array, " rows"], dtype: DTypeLike) -> Float[Array, " rows"]:
    """What an entry of P loses when it is stored in that dtype: e − round(e)."""
    # Not a conversion there and back, which XLA may leave out as excess precision.
    of = jnp.finfo(dtype)
    lost = entry - lax.reduce_precision(entry, of.nexp, of.nmant)
    return jnp.where(jnp.isfinite(lost), lost, 0.0)


def pull(
    lost: Float[Array, " rows"], head: Float[Array, "V D"], labels: Int[Array, " rows"]
) -> Float[Array, "rows D"]:
    """e_n·C_y of each row; 0 where nothing is lost, whatever the head holds there."""
    rows = head[jnp.maximum(labels, 0)].astype(jnp.float32)
    return jnp.where((lost != 0.0)[:, None], lost[:, None] * rows, 0.0)
