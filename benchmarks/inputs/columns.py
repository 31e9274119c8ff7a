"""Which probabilities pass a threshold, and in how few columns: what decides a filter's speed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class ColumnStatistics(NamedTuple):
    """Which probabilities pass ε, as shares; a block is 128 consecutive tokens."""

    elements: float
    """The share of the N·V elements with p > ε."""
    block_columns: float
    """The share of the V columns with such an element in a block; mean over blocks."""
    tiles: float
    """The share of tiles, a block and 128 consecutive columns, with such an element."""
    sorted_tiles: float
    """The same with the columns ordered by their mean logit."""
    union: dict[int, float]
    """The share of the V columns with such an element in the first 1024, 2048, 4096, … tokens."""


def column_statistics(
    hidden: Float[Array | np.ndarray, "N D"],
    head: Float[Array | np.ndarray, "V D"],
    *,
    eps: float = 2.0**-12,
) -> ColumnStatistics:
    """Measures where p > eps, a block of tokens at a time; a ragged last block is left out.

    ValueError if there is no whole block of tokens or tile of columns.
    """
    blocks, v = len(hidden) // 128, len(head)
    if blocks == 0 or v < 128:
        raise ValueError(f"N={len(hidden)} and V={v} must both be at least 128")
    elements = 0
    active = np.zeros((blocks, v), bool)
    for block in range(blocks):
        count, columns = _active(hidden[128 * block : 128 * (block + 1)], head, eps)
        elements += int(count)
        active[block] = columns
    mean_logit = np.asarray(head, np.float32) @ np.asarray(hidden, np.float32).mean(0)
    union = np.logical_or.accumulate(active)
    sizes = [128 * 2**i for i in range(3, 20) if 2**i <= blocks]
    return ColumnStatistics(
        elements / (128 * blocks * v),
        float(active.mean()),
        _tiles(active),
        _tiles(active[:, np.argsort(-mean_logit, kind="stable")]),
        {size: float(union[size // 128 - 1].mean()) for size in sizes},
    )


@jax.jit
def _active(hidden: Float[Array, "B D"], head: Float[Array, "V D"], eps: float):
    z = jnp.dot(hidden, head.T, preferred_element_type=jnp.float32)
    above = jax.nn.softmax(z, axis=1) > eps
    return jnp.sum(above), jnp.any(above, axis=0)


def _tiles(active: np.ndarray) -> float:
    blocks, v = active.shape
    return float(active[:, : v // 128 * 128].reshape(blocks, -1, 128).any(2).mean())
