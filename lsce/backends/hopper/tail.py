"""The rest of a filtered backward pass in 8 bits, chunk by chunk (`lsce.sparse.tail`).

All pairs of a chunk's columns and blocks of tokens are computed, those that 16-bit tiles hold as 0:
a few percent more work, for products of plain matrices whose operands CTAs share.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int

from lsce.backends.hopper.call import Call
from lsce.backends.hopper.chunks import finite_bias, live_blocks
from lsce.backends.hopper.forward import Saved
from lsce.backends.hopper.kernels.head_gradient import head_gradient
from lsce.backends.hopper.kernels.hidden_gradient import accumulate_hidden
from lsce.backends.hopper.kernels.lse_forward import LOG2E, LOWEST
from lsce.backends.hopper.kernels.tail_terms import Terms, interleaved, tail_terms
from lsce.backends.hopper.tiles import CONSUMERS
from lsce.problem import cdiv
from lsce.sparse import filter as filtering
from lsce.sparse import tail
from lsce.sparse.coefficients import Coefficients
from lsce.sparse.plan import dense_work
from lsce.sparse.tokens import BLOCK
from lsce.wanted import Wanted

STEP = 128
"""Entries of a stage of 8 bits: what D is padded to."""


class Tail:
    """What all chunks share: operands of tokens in both orders, and buffers for the terms."""

    def __init__(
        self,
        call: Call,
        saved: Saved,
        c: Coefficients,
        wanted: Wanted,
        active: Bool[Array, "T B"],
        padded_d: int,
    ) -> None:
        p, tiles = call.problem, call.tiles.tail
        rows, d = saved.hidden.shape
        self.call, self.saved, self.wanted = call, saved, wanted
        self.blocks, self.per_chunk = rows // BLOCK, tiles.slots_per_block
        self.live = live_blocks(saved)
        self.column_tiles = cdiv(p.v, tiles.tile_c)
        slots = self.per_chunk * self.blocks
        self.work = dense_work(
            self.blocks,
            self.live,
            self.column_tiles,
            slots=slots,
            group=tiles.group,
            together=tiles.together(d) * 2,  # of half as many bytes
        )
        missing = CONSUMERS * self.column_tiles - active.shape[0]
        self.marked = jnp.pad(active, ((0, missing), (0, 0))).astype(jnp.int32)
        self.scales = s = tail.scales(saved.hidden, saved.live, saved.head, p.v)
        log_epsilon = filtering.log_epsilon("fp8", saved.live, p.v)
        self.most = jnp.reshape(log_epsilon * LOG2E, 1)
        r = tail.row_factors(c, log_epsilon)
        self.inverse = tail.inverse(r)
        self.e8 = self._padded(tail.quantised(saved.hidden, s.hidden_mean, s.hidden))
        # log2 p, or under a cap what is capped, in nats.
        self.unit = p.logit_scale * (LOG2E if p.softcap is None else 1.0)
        lse = c.lse * LOG2E
        centred = saved.hidden.astype(jnp.float32) - s.hidden_mean[None, :]
        row = self.unit * jnp.dot(centred, s.head_mean, precision="highest")
        kappa = c.kappa if call.dense_smoothing else c.s  # read by nobody
        self.of_rows = (row - lse if p.softcap is None else row, lse, c.a * r, c.s * r, kappa)
        pad = lambda x: jnp.pad(x, (0, padded_d - d))
        self.hidden_factors = self.inverse, pad(s.unit * s.hidden)
        e9, e9_unit = tail.of_tokens(saved.hidden, r)
        self.e9, self.head_factors = interleaved(e9).swapaxes(0, 1), pad(e9_unit)
        empty = lambda shape, dtype: jax.new_ref(lax.empty(shape, dtype))
        self.t_ref = empty((slots * BLOCK, tiles.tile_c), tail.E4M3)
        self.transposed_ref = empty((slots * tiles.tile_c, BLOCK), tail.E4M3)
        self.mass_ref = empty((slots * CONSUMERS * BLOCK,), jnp.float32)
        columns = self.per_chunk * tiles.tile_c
        self.low_ref = empty((columns, d) if wanted.head else (16, 64), saved.head.dtype)
        self.options: dict[str, Any] = {
            "tiles": tiles,
            "ctas": call.ctas,
            "interpret": call.interpret,
        }

    def products(
        self,
        number: Int[Array, ""],
        head: BFloat16[Array, "columns D"],
        ids: Int[Array, " columns"],
        mine: Bool[Array, " columns"],
        constant: Float[Array, " padded_d"],
        *,
        dh_ref: Any,
        dc_ref: Any,
    ) -> Any:
        """The terms of a chunk's columns, `head` and `ids`, of which some are `mine`; then dE's
        part to what dh_ref has, and dC's as the sum of dc_ref and the reference returned."""
        p, s, at = self.call.problem, self.scales, jnp.asarray(number, jnp.int32).reshape(1)
        # As one kernel with what turns C₈, XLA would turn the rows in 32 bits too.
        again = lax.optimization_barrier(head).astype(jnp.float32)
        column = jnp.sum(again * s.hidden_mean[None, :], axis=1) * self.unit
        bias = finite_bias(self.saved)
        if bias is not None:
            column = column + bias.at[ids].get(mode="clip") * (self.unit / p.logit_scale)
        column = jnp.where(mine & (ids < p.v), jnp.maximum(column, LOWEST), LOWEST)
        c8 = tail.quantised(head, s.head_mean, s.head)
        unit = (self.unit * s.unit).reshape(1)
        tail_terms(
            self.e8,
            self._padded(c8),
            Terms(unit, self.most, column, *self.of_rows),
            self.marked,
            self.work,
            at,
            self.t_ref,
            self.transposed_ref,
            self.mass_ref,
            softcap=p.softcap,
            smooth=self.call.dense_smoothing,
            v=p.v,
            **self.options,
        )
        same: dict[str, Any] = {"gathered": True} | self.options
        if self.wanted.hidden:
            accumulate_hidden(
                self.t_ref,
                c8.swapaxes(0, 1),
                self.work,
                at,
                dh_ref,
                dense=True,
                factors=self.hidden_factors,
                **same,
            )
        if self.wanted.head:
            head_gradient(
                self.transposed_ref,
                self.e9,
                self.work,
                at,
                constant,
                dc_ref,
                carry=(self.low_ref, False, True),
                after=dh_ref if self.wanted.hidden else None,
                factors=self.head_factors,
                **same,
            )
        return self.low_ref

    def mass(self, number: Int[Array, ""]) -> Float[Array, " rows"]:
        """Σ_v T of a chunk's columns, by row."""
        by_tile = self.mass_ref[...].reshape(self.per_chunk, self.blocks, CONSUMERS, BLOCK)
        tile = number * self.per_chunk + jnp.arange(self.per_chunk)
        made = (tile < self.column_tiles)[:, None] & (jnp.arange(self.blocks) < self.live)[None, :]
        by_tile = jnp.where(made[..., None, None], by_tile, 0.0)
        return by_tile.sum((0, 2)).reshape(-1) * self.inverse

    def column_sums(self) -> Float[Array, " columns"]:
        """Σ_n T of a chunk's columns; of tiles that the last chunk lacks it does not matter."""
        shape = self.per_chunk, self.blocks, -1, BLOCK
        t8 = self.transposed_ref[...].reshape(shape).astype(jnp.float32)
        made = (jnp.arange(self.blocks) < self.live)[None, :, None, None]
        inverse = interleaved(self.inverse).reshape(self.blocks, BLOCK)
        return (jnp.where(made, t8, 0.0) * inverse[None, :, None, :]).sum((1, 3)).reshape(-1)

    def _padded(self, x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % STEP)))
