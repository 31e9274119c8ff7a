"""Numbers kept in bfloat16: rounded up or down by chance, so that none is lost on average.

From one bfloat16 to the next it is 2⁻⁷ to 2⁻⁸ of a weight, and an update is often less than half of
that: rounded to the nearest, the weight stays as it was at each step, however many there are.
Rounded by chance (Gupta et al. 2015, https://arxiv.org/abs/1502.02551), it moves as far as it
should on average.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray, UInt32


def widened(tree: Any) -> Any:
    """The tree with float32 for bfloat16, which loses nothing."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def narrowed(tree: Any, like: Any, key: PRNGKeyArray) -> Any:
    """The tree with bfloat16, rounded by chance, where `like` has it."""
    leaves, structure = jax.tree.flatten(tree)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
    return structure.unflatten(
        rounded(leaf, jax.random.fold_in(key, i)) if dtype == jnp.bfloat16 else leaf
        for i, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True))
    )


def rounded(x: Float32[Array, "*S"], key: PRNGKeyArray) -> BFloat16[Array, "*S"]:
    """One of the two bfloat16 next to each number: in the mean over keys, the number itself.

    What is no finite number stays what it is.
    """
    # A bfloat16 is the upper half of a float32. A uniform number added to the lower half carries
    # into the upper as often as the lower half is large.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_noise(key, x.shape) >> 16)
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def _noise(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "*S"]:
    """Random bits, computed where they are used: those of `jax.random` would be written first.

    Each is a hash of its own index, so that devices that share an array need not agree: two rounds
    of https://github.com/skeeto/hash-prospector's lowbias32, each with a word of the key.
    """
    x = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        x = x * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for word in jax.random.bits(key, (2,)):
        x ^= word
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        x ^= x >> 16
    return x
