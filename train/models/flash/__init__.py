"""Attention within the segments of packed rows, on Hopper GPUs: what no token sees costs nothing.

    o_t = Σ_s p_ts · v_s,    p_t = softmax over the keys s that t sees of cap(scale · q_t·k_s)

A query sees the keys from some first one on up to itself: those of its segment, or no more than a
window of them. In a row whose segments follow each other that first key never moves back, so the
tiles of keys that a tile of queries meets are a range, and so are the tiles of queries that a tile
of keys meets. The kernels walk over those ranges and no further. cuDNN's packed layout takes time
by rows × segments.

`forward.py` makes o and the log-sum-exp of each query, `query_gradient.py` and `key_gradient.py`
recompute p from it; nothing of T × T is ever in memory. No sum depends on the order in which
thread blocks run, so that bits are the same each time. Each is a program of its own, made once for
all layers. What they share is in `kernel.py` and `tiles.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from train.models.flash.tiles import TILE, Bounds, Scores

__all__ = ["HEAD_SIZES", "Bounds", "attention", "bounds"]

HEAD_SIZES = 64, 128, 256


def bounds(starts: Int[Array, "B M"], length: int, window: int | None) -> Bounds:
    """What the tokens of rows see whose segments begin at `starts`; T stands for none.

    Args:
        starts: where the segments of a row begin, in order.
        length: tokens in a row.
        window: how many keys a query sees at most, its own included; None: its whole segment.
    """
    at, starts = jnp.arange(length, dtype=jnp.int32)[None], starts[:, None, :]
    begun = starts <= at[..., None]
    first = jnp.max(jnp.where(begun, starts, 0), axis=-1)
    end = jnp.min(jnp.where(begun, length, starts), axis=-1)
    if window is not None:
        first, end = jnp.maximum(first, at - (window - 1)), jnp.minimum(end, at + window)
    return Bounds(first, end)


def attention(
    query: BFloat16[Array, "B T N H"],
    key: BFloat16[Array, "B T K H"],
    value: BFloat16[Array, "B T K H"],
    seen: Bounds,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: Any = None,
) -> BFloat16[Array, "B T N H"]:
    """o, as above; N/K queries share a key. Scores and sums are float32.

    Args:
        query, key, value: with H one of `HEAD_SIZES`.
        seen: which keys each query sees.
        scale: of the scores.
        softcap: bounds the scores to ±softcap by softcap·tanh(score/softcap); None: nothing does.
        interpret: parameters of Mosaic GPU's interpreter, which runs the kernels on a CPU.
    """
    length = query.shape[1]
    missing = -length % TILE
    if missing:
        # Each of what is added sees itself.
        after = jnp.arange(length, length + missing, dtype=jnp.int32)
        after = jnp.broadcast_to(after[None], (len(query), missing))
        seen = Bounds(
            jnp.concatenate([seen.first, after], 1), jnp.concatenate([seen.end, after + 1], 1)
        )
        padding = (0, 0), (0, missing), (0, 0), (0, 0)
        query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    scores = Scores(float(scale), None if softcap is None else float(softcap), interpret)
    out: Any = _attention(query, key, value, seen, scores)
    return out[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query: Array, key: Array, value: Array, seen: Bounds, scores: Scores) -> Array:
    return _forward(query, key, value, seen, scores)[0]


def _forward(
    query: Array, key: Array, value: Array, seen: Bounds, scores: Scores
) -> tuple[Array, Any]:
    # Imported where they are used: without these kernels nothing of Mosaic GPU should load.
    from train.models.flash.forward import forward

    out, lse = forward(query, key, value, seen, scores)
    return out, (query, key, value, seen, out, lse)


def _backward(
    scores: Scores, kept: Any, gradient: Float[Array, "B T N H"]
) -> tuple[Array, Array, Array, None]:
    from train.models.flash.key_gradient import key_gradients
    from train.models.flash.query_gradient import query_gradient

    query, key, value, seen, out, lse = kept
    dq, delta = query_gradient(query, key, value, seen, out, lse, gradient, scores)
    dk, dv = key_gradients(query, key, value, seen, lse, delta, gradient, scores)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)
