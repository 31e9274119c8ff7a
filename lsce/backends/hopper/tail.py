"""A filtered backward pass whose rest is computed in 8 bits (`lsce.sparse.tail`), before it.

All columns go through it in the vocabulary's order, chunk by chunk, with all blocks of tokens; the
terms of pairs that a 16-bit tile holds are 0 there. That is a few percent more work, for products
of plain matrices whose operands CTAs share, and nothing is gathered or scattered. It begins dE and
every row of dC; `filtered` then adds what the tiles hold to the few rows that have any, which are
so rounded twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, BFloat16, Bool, Float, Int

from lsce.backends.hopper import filtered
from lsce.backends.hopper.call import Call, in_stages
from lsce.backends.hopper.chunks import Loop, Products, finite_bias, live_blocks
from lsce.backends.hopper.forward import Saved
from lsce.backends.hopper.kernels.head_gradient import head_gradient
from lsce.backends.hopper.kernels.hidden_gradient import accumulate_hidden
from lsce.backends.hopper.kernels.lse_forward import LOG2E, LOWEST
from lsce.backends.hopper.kernels.tail_terms import NO_CLASS, Terms, interleaved, tail_terms
from lsce.backends.hopper.tiles import CONSUMERS
from lsce.problem import cdiv
from lsce.sparse import filter as filtering
from lsce.sparse import plan, tail
from lsce.sparse.coefficients import Coefficients
from lsce.sparse.tokens import BLOCK
from lsce.wanted import Wanted


def products(
    call: Call, saved: Saved, c: Coefficients, wanted: Wanted, tiled: filtered.Plan
) -> Products:
    """The sums over P of 16-bit tiles, and over what they lack in 8 bits."""
    p = call.problem

    def rest(c: Coefficients, loop: Loop, dhead_ref) -> filtered.Begun:
        terms = Tail(call, saved, c, wanted, loop, _kept(tiled, p.v))

        def body(number, carry):
            dbias, left = carry
            terms.products(number, dhead_ref)
            if wanted.bias:
                at = (number * terms.width,)
                dbias = lax.dynamic_update_slice(dbias, terms.column_sums(), at)
            if left is not None and wanted.hidden:
                left = left + terms.mass(number)
            return dbias, left

        dbias = jnp.zeros(terms.chunks * terms.width if wanted.bias else 0, jnp.float32)
        left = jnp.zeros_like(c.a) if p.softcap is not None else None
        dbias, left = lax.fori_loop(0, terms.chunks, body, (dbias, left))
        return filtered.Begun(dbias[: p.v], left)

    found = filtered.products(call, saved, c, wanted, tiled, rest)
    if found.tail is not None:
        return found
    # Without a cap it is what the tiles of 16 bits lack.
    return found._replace(tail=c.a * jnp.clip(1.0 - found.kept, 0.0, 1.0))


def where_flat(
    call: Call, saved: Saved, c: Coefficients, wanted: Wanted, tiled: filtered.Plan
) -> Products:
    """The same in chunks that are made for this case, of logits without cap or bias.

    Tokens that are known to be flat were marked at the ε of "fp8", others at the filter's, which is
    no higher.
    """
    assert call.tiles.tail_where_flat is not None
    tiles = dataclasses.replace(call.tiles, tail=call.tiles.tail_where_flat)
    call = dataclasses.replace(call, tiles=tiles, epsilon="fp8")
    # What the tiles lack pulls along the mean row there, too.
    return products(call, saved, c, wanted, tiled)._replace(tail=None)


class Tail:
    """What all chunks share: operands and factors of tokens and columns, and the terms' buffers."""

    def __init__(
        self,
        call: Call,
        saved: Saved,
        c: Coefficients,
        wanted: Wanted,
        loop: Loop,
        kept: Int[Array, "groups V"],
    ) -> None:
        p, tiles = call.problem, call.tiles.tail
        rows, d = saved.hidden.shape
        self.call, self.saved, self.wanted, self.loop = call, saved, wanted, loop
        self.tiles, self.live, self.blocks = tiles, live_blocks(saved), rows // BLOCK
        self.column_tiles, self.per_chunk = cdiv(p.v, tiles.tile_c), tiles.slots_per_block
        self.chunks = cdiv(self.column_tiles, self.per_chunk)
        self.width = self.per_chunk * tiles.tile_c
        slots = self.per_chunk * self.blocks
        self.work = plan.dense_work(
            self.blocks,
            self.live,
            self.column_tiles,
            slots=slots,
            group=tiles.group,
            together=tiles.together(d) * 2,  # of half as many bytes
        )
        self.scales = s = tail.scales(saved.hidden, saved.live, saved.head, p.v)
        assert call.epsilon is not None
        log_epsilon = filtering.log_epsilon(call.epsilon, saved.live, p.v)
        r = tail.row_factors(c, log_epsilon)
        self.inverse = tail.inverse(r)
        self.e8 = in_stages(tail.quantised(saved.hidden, s.hidden_mean, s.hidden))
        # log2 p, or under a cap what is capped, in nats.
        unit = p.logit_scale * (LOG2E if p.softcap is None else 1.0)
        lse = c.lse * LOG2E
        centred = saved.hidden.astype(jnp.float32) - s.hidden_mean[None, :]
        row = unit * jnp.dot(centred, s.head_mean, precision="highest")
        beyond = self.chunks * self.width - p.v
        column = jnp.pad(self._column(unit), (0, beyond), constant_values=NO_CLASS)
        self.terms = Terms(
            (unit * s.unit).reshape(1),
            jnp.reshape(log_epsilon * LOG2E, 1),
            column,
            row - lse if p.softcap is None else row,
            lse,
            c.a * r,
            c.s * r,
            c.kappa if call.dense_smoothing else c.s,  # read by nobody
        )
        self.kept = jnp.pad(kept, ((0, 0), (0, beyond)))
        pad = lambda x: jnp.pad(x, (0, loop.padded_d - d))
        self.hidden_factors = self.inverse, pad(s.unit * s.hidden)
        e9, e9_unit = tail.of_tokens(saved.hidden, r)
        self.e9, self.head_factors = interleaved(e9).swapaxes(0, 1), pad(e9_unit)
        empty = lambda shape, dtype: jax.new_ref(lax.empty(shape, dtype))
        self.t_ref = empty((slots * BLOCK, tiles.tile_c), tail.E4M3)
        self.transposed_ref = empty((slots * tiles.tile_c, BLOCK), tail.E4M3)
        masses = slots * CONSUMERS * BLOCK if p.softcap is not None else BLOCK  # not written
        self.mass_ref = empty((masses,), jnp.float32)

    def _column(self, unit: float) -> Float[Array, " V"]:
        """What a logit has of its column: ē·C_v and the bias."""
        p, bias = self.call.problem, finite_bias(self.saved)
        # A product of matrices would turn the head in 32 bits first.
        mean = self.scales.hidden_mean[None, :]
        column = jnp.sum(self.saved.head.astype(jnp.float32) * mean, axis=1)[: p.v] * unit
        if bias is not None:
            column = column + bias * (unit / p.logit_scale)
        return jnp.maximum(column, LOWEST)

    def products(self, number: Int[Array, ""], dhead_ref: Any) -> None:
        """The terms of a chunk's columns; then dE's part to what there is, and its rows of dC."""
        s, at = self.scales, jnp.asarray(number, jnp.int32).reshape(1)
        options: dict[str, Any] = {
            "tiles": self.tiles,
            "ctas": self.call.ctas,
            "interpret": self.call.interpret,
        }
        # Else XLA turns what it quantises, five times slower than first one and then the other.
        c8 = tail.quantised(self._head(number), s.head_mean, s.head)
        c8 = lax.optimization_barrier(with_layout_constraint(c8, Layout((0, 1))))
        tail_terms(
            self.e8,
            in_stages(c8),
            self.terms,
            self.kept,
            self.work,
            at,
            self.t_ref,
            self.transposed_ref,
            self.mass_ref,
            softcap=self.call.problem.softcap,
            smooth=self.call.dense_smoothing,
            **options,
        )
        if self.wanted.hidden:
            accumulate_hidden(
                self.t_ref,
                c8.swapaxes(0, 1),
                self.work,
                at,
                self.loop.dh_ref,
                gathered=True,
                dense=True,
                factors=self.hidden_factors,
                **options,
            )
        if self.wanted.head:
            head_gradient(
                self.transposed_ref,
                self.e9,
                self.work,
                at,
                self.loop.constant,
                dhead_ref,
                gathered=False,
                factors=self.head_factors,
                **options,
            )

    def _head(self, number: Int[Array, ""]) -> BFloat16[Array, "columns D"]:
        """A chunk's rows of the head, and behind the last row that again."""
        ids = number * self.width + jnp.arange(self.width, dtype=jnp.int32)
        return self.saved.head.at[ids].get(mode="clip")

    def mass(self, number: Int[Array, ""]) -> Float[Array, " rows"]:
        """Σ_v T of a chunk's columns, by row."""
        by_tile = self.mass_ref[...].reshape(self.per_chunk, self.blocks, CONSUMERS, BLOCK)
        tile = number * self.per_chunk + jnp.arange(self.per_chunk)
        made = (tile < self.column_tiles)[:, None] & self._live()[None, :]
        by_tile = jnp.where(made[..., None, None], by_tile, 0.0)
        return by_tile.sum((0, 2)).reshape(-1) * self.inverse

    def column_sums(self) -> Float[Array, " columns"]:
        """Σ_n T of a chunk's columns; of tiles that the last chunk lacks it does not matter."""
        shape = self.per_chunk, self.blocks, -1, BLOCK
        t8 = self.transposed_ref[...].reshape(shape).astype(jnp.float32)
        inverse = interleaved(self.inverse).reshape(self.blocks, BLOCK)
        t8 = jnp.where(self._live()[None, :, None, None], t8, 0.0)
        return (t8 * inverse[None, :, None, :]).sum((1, 3)).reshape(-1)

    def _live(self) -> Bool[Array, " B"]:
        return jnp.arange(self.blocks) < self.live


def _kept(tiled: filtered.Plan, v: int) -> Int[Array, "groups V"]:
    """Which blocks hold a column in a 16-bit tile: a bit a block, 32 of them a word."""
    tiles, blocks = tiled.active.shape
    bits = jnp.pad(tiled.active, ((0, 0), (0, -blocks % 32))).reshape(tiles, -1, 32)
    words = jnp.where(bits, jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32), 0)
    words = lax.bitcast_convert_type(words.sum(2, dtype=jnp.uint32), jnp.int32)
    tile = jnp.arange(v, dtype=jnp.int32) // (tiled.order.size // tiles)
    tile_of_column = jnp.zeros(v, jnp.int32).at[tiled.order[:v]].set(tile, unique_indices=True)
    return words.T[:, tile_of_column]
