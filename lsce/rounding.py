"""What rounding does to a token's target term, and what dE gets back of it.

The gradient's products take dz_nv, without its smoothing, rounded to 16 bits. The target's,
p_y − (1−β), is the largest of its row unless p_y is near 1−β, and its rounding as large a part of
dE's error as that of the result: on Gemma 3 270M's activations .0016 of .0025, on columns drawn
like them .0022 of .0031 (benchmarks/notes/exact-and-fused.md). What was cut off is one number a
token:

    dE_n += e_n·C_y      e_n = dz_ny − round(dz_ny)

Two classes alone, without smoothing, are rounded alike, and where their rows are nearly the same
that cancels: there, and nowhere else that was tried, the correction adds to the error.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int


def lost(entry: Float[Array, " rows"], dtype: DTypeLike) -> Float[Array, " rows"]:
    """e: what a term loses in that dtype, 0 if that is no number; a constant to a derivative."""
    # Not a conversion there and back, which XLA may leave out as excess precision.
    of, entry = jnp.finfo(dtype), lax.stop_gradient(entry)
    e = entry - lax.reduce_precision(entry, of.nexp, of.nmant)
    return jnp.where(jnp.isfinite(e), e, 0.0)


def given_back(
    e: Float[Array, " rows"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Int[Array, " rows"],
    axis: int = 0,
) -> Float[Array, "rows D"]:
    """e_n·C_y of each row, the classes along that axis of the head; 0 where nothing is lost,
    whatever the head holds there."""
    rows = jnp.take(head, jnp.maximum(labels, 0), axis=axis, mode="clip").astype(jnp.float32)
    rows = rows if axis == 0 else rows.T
    return jnp.where((e != 0.0)[:, None], e[:, None] * rows, 0.0)
