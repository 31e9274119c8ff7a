"""The forward's pass over the vocabulary in 8 bits: what is small of each token's sum.

With a bound b of each token's logits, in log2 units,

    x = unit·E₈·C₈ᵀ + column,      small = Σ 2^(x−b) over x ≤ b

so that no term is more than 1, nothing has to be rescaled, and what is large is not in the sum: a
column that has something large for any token is computed again in 16 bits (`eight_bits`). Which
columns have is marked as a filter's are, which may have a bound of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int

from lsce.backends.hopper.kernels import marks
from lsce.backends.hopper.kernels.lse_forward import LOWEST
from lsce.backends.hopper.kernels.pipeline import COLUMN, ROW, i32
from lsce.backends.hopper.kernels.stretches import Stretches, summed
from lsce.backends.hopper.tiles import ForwardTiles


class LowSums(NamedTuple):
    """Of each token and, as `marks.unpack` says, of each block and column."""

    small: Float[Array, " N"]
    large: Int[Array, "blocks 4 words"]
    """The columns with an x above the bound."""
    below: Float[Array, " N"] | None
    """Σ 2^(x−b) over what lies below the filter's bound."""
    marks: Int[Array, "blocks 4 words"] | None
    """The columns with an x above that."""


def low_sums(
    hidden: Float8e4m3fn[Array, "N D"],
    head: Float8e4m3fn[Array, "rows D"],
    column: Float[Array, " V"],
    unit: Float[Array, ""],
    bound: Float[Array, " N"],
    filter_gap: Float[Array, ""] | None,
    live: Int[Array, ""],
    *,
    tiles: ForwardTiles,
    ctas: int = 132,
    interpret: Any = None,
) -> LowSums:
    """The sums of the first `live` tokens; later rows hold garbage.

    A bound of ∞ keeps rows without a loss from marking anything. The filter's bound is the other
    less `filter_gap`.
    """
    n, d = hidden.shape
    v = column.shape[0]
    cut = Stretches(n, v, d * hidden.dtype.itemsize, live, tiles=tiles, ctas=ctas)
    filtering = filter_gap is not None
    names = ["small", "below"] if filtering else ["small"]

    def prepare(inputs, marks_gmem, _):
        column_gmem, bound_gmem, scalars_gmem = inputs

        def begin(row0):
            rows = pl.ds(row0, tiles.tile_n)
            bound = plgpu.load(bound_gmem.at[rows], layout=ROW, optimized=False)
            nothing = plgpu.layout_cast(jnp.zeros((tiles.tile_n,), jnp.float32), ROW)
            update = lambda acc, tile, old: sums(acc, tile, row0, bound, old)
            return dict.fromkeys(names, nothing), update

        def sums(acc, tile, row0, bound, old):
            part = column_gmem.at[pl.ds(tile * tiles.tile_v, tiles.tile_v)]
            part = plgpu.load(part, layout=COLUMN, optimized=False)
            x = acc * scalars_gmem[0] + lax.broadcast_in_dim(part, acc.shape, [1])
            top = x.max(axis=1)
            lower = bound - scalars_gmem[1]
            block = lax.div(row0, i32(tiles.tile_n))
            for of, words in zip((bound, lower), marks_gmem, strict=False):
                marks.store(x, top, of, words, block, tile, interpret=interpret is not None)

            def terms(x):
                wide = lambda row: lax.broadcast_in_dim(row, x.shape, [0])
                p = jnp.exp2(x - wide(bound))
                terms = {"small": jnp.where(x > wide(bound), 0.0, p)}
                if filtering:
                    terms["below"] = jnp.where(x > wide(lower), 0.0, p)
                return terms

            return {name: old[name] + value for name, value in summed(x, terms).items()}

        return begin

    scalars = jnp.stack([unit, filter_gap if filtering else jnp.float32(0.0)])
    parts, marked = cut.sums(
        hidden,
        head,
        (
            jnp.pad(column, (0, cut.columns - v), constant_values=LOWEST),
            jnp.pad(bound, (0, cut.rows - n), constant_values=jnp.inf),
            jnp.pad(scalars, (0, 6)),
        ),
        names,
        prepare,
        lambda a, b: {name: a[name] + b[name] for name in names},
        marked=len(names),
        interpret=interpret,
        name="lsce_low_sums",
    )
    total = {name: jnp.where(cut.valid, part, 0.0).sum(0) for name, part in parts.items()}
    large, *others = marked
    return LowSums(total["small"], large, total.get("below"), others[0] if others else None)
