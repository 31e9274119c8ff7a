"""Exact sums in 32-bit integers, so that adding up is the same in every order.

A number is four limbs of uint32, the lowest first, worth 2⁰, 2¹⁶, 2³² and 2⁴⁸. Between operations
the lower three hold less than 2¹⁶: so 2¹⁶ numbers may be added limb by limb, by `+` or by `psum`,
before `carry` has to run. The highest limb keeps all 32 bits, hence numbers up to 2⁸⁰.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

BITS = 16
LIMBS = 4


def zeros(*shape: int) -> UInt32[Array, "*shape 4"]:
    """Zeros."""
    return jnp.zeros((*shape, LIMBS), jnp.uint32)


def carry(limbs: UInt32[Array, "*any 4"]) -> UInt32[Array, "*any 4"]:
    """The same numbers with less than 2¹⁶ in all limbs but the highest."""
    parts = [limbs[..., i] for i in range(LIMBS)]
    for i in range(LIMBS - 1):
        parts[i + 1] = parts[i + 1] + (parts[i] >> BITS)
        parts[i] = _low_bits(parts[i])
    return jnp.stack(parts, axis=-1)


def total(limbs: UInt32[Array, "N *any 4"], axis: int = 0) -> UInt32[Array, "*any 4"]:
    """The sum along an axis of at most 2¹⁶ numbers."""
    return carry(jnp.sum(limbs, axis=axis, dtype=jnp.uint32))


def sums_by_bin(
    values: UInt32[Array, "N C"], index: Int[Array, " N"], bins: int
) -> UInt32[Array, "B C 4"]:
    """Σ of the rows of `values` in each of the bins, for N below 2³²."""
    n, columns = values.shape
    limbs = jnp.stack([_low_bits(values), values >> BITS], axis=-1)
    # About √N rows meet in one partial sum, hence less than 2³² even in limbs of 2¹⁶ − 1.
    partials = max(1, math.isqrt(n))
    cell = index * partials + jnp.arange(n, dtype=index.dtype) % partials
    sums = jax.ops.segment_sum(limbs, cell, bins * partials)
    sums = jnp.pad(sums, ((0, 0), (0, 0), (0, LIMBS - 2)))
    return total(carry(sums).reshape(bins, partials, columns, LIMBS), axis=1)


def as_float(limbs: UInt32[Array, "*any 4"]) -> Float[Array, "*any"]:
    """The numbers as floats, to about one part in 10⁷ in float32."""
    worth = jnp.asarray(2.0 ** (BITS * np.arange(LIMBS)))
    return jnp.matmul(limbs.astype(worth.dtype), worth, precision=jax.lax.Precision.HIGHEST)


def as_uint32(limbs: UInt32[Array, "*any 4"]) -> UInt32[Array, "*any"]:
    """The numbers themselves, or 2³² − 1 where they are larger."""
    fits = jnp.all(limbs[..., 2:] == 0, axis=-1)
    return jnp.where(fits, limbs[..., 0] | (limbs[..., 1] << BITS), jnp.uint32(0xFFFFFFFF))


def _low_bits(x: UInt32[Array, "*any"]) -> UInt32[Array, "*any"]:
    return x & ((1 << BITS) - 1)
