"""Attention of packed rows by `flash` and, in float32, by XLA: outputs and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.models import attention, flash


def packed(starts: list[list[int]], length: int, heads: tuple[int, int], size: int) -> Any:
    """Queries, keys, values and a gradient, bfloat16; where segments start, and their numbers."""
    random = np.random.default_rng(0)
    rows, queries, keys = len(starts), *heads
    arrays = tuple(
        jnp.asarray(random.normal(size=(rows, length, n, size)), jnp.bfloat16)
        for n in (queries, keys, keys, queries)
    )
    begins = jnp.asarray(starts, jnp.int32)
    return arrays, begins, numbered(begins, length)


def numbered(starts: Any, length: int) -> Any:
    return (starts[:, None, :] <= jnp.arange(length)[None, :, None]).sum(-1)


def gradients(function: Any, arrays: Any) -> Any:
    *given, gradient = arrays
    out, pull = jax.vjp(function, *given)
    return out, *pull(gradient.astype(out.dtype))


def ours(arrays: Any, starts: Any, window: int | None, **options: Any) -> Any:
    seen = flash.bounds(starts, arrays[0].shape[1], window)
    return gradients(functools.partial(flash.attention, seen=seen, **options), arrays)


def theirs(arrays: Any, segments: Any, window: int | None, scale: float, softcap: Any) -> Any:
    mask = attention.attention_mask(segments, window)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return attention._attend_by_xla(query, key, value, mask, scale, softcap)

    return gradients(attend, [x.astype(jnp.float32) for x in arrays])


def assert_close(found: Any, wanted: Any) -> None:
    """To bfloat16's rounding of what is multiplied."""
    for name, a, b in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) < 5e-3 * np.linalg.norm(b), name
