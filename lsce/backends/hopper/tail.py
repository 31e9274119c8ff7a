"""A filtered backward pass whose rest is computed in 8 bits (`lsce.sparse.tail`), chunk by chunk.

All columns go through the chunks, those that some 16-bit tile holds first. As long as there are
such columns a chunk has both parts: its tiles of 16 bits, and in 8 bits all pairs of its columns
and of blocks of tokens, those of the tiles as 0. That is a few percent more work, for products of
plain matrices whose operands CTAs share. The columns after them are in 8 bits alone, in wider
chunks, which lie where the 16-bit P was: fewer kernels, and fewer times through the sums of dE.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, BFloat16, Bool, Float, Int

from lsce.backends.hopper import filtered
from lsce.backends.hopper.call import Call
from lsce.backends.hopper.chunks import Loop, Products, finite_bias, live_blocks
from lsce.backends.hopper.forward import Saved
from lsce.backends.hopper.kernels import rows
from lsce.backends.hopper.kernels.head_gradient import head_gradient
from lsce.backends.hopper.kernels.hidden_gradient import accumulate_hidden
from lsce.backends.hopper.kernels.lse_forward import LOG2E, LOWEST
from lsce.backends.hopper.kernels.tail_terms import Terms, interleaved, tail_terms
from lsce.backends.hopper.tiles import CONSUMERS, BackwardTiles
from lsce.problem import cdiv
from lsce.sparse import filter as filtering
from lsce.sparse import plan, tail
from lsce.sparse.coefficients import Coefficients
from lsce.sparse.tokens import BLOCK
from lsce.wanted import Wanted

STEP = 128
"""Entries of a stage of 8 bits: what D is padded to."""


def products(call: Call, saved: Saved, c: Coefficients, wanted: Wanted) -> Products:
    """The sums over P of 16-bit tiles, and over what they lack in 8 bits."""
    p, tiles = call.problem, call.tiles
    head_rows, d = saved.head.shape
    blocks = saved.hidden.shape[0] // BLOCK
    tile_c, per_chunk = tiles.tail.tile_c, tiles.tail.slots_per_block
    column_tiles = cdiv(p.v, tile_c)
    chunks = cdiv(column_tiles, per_chunk)
    usual = tiles.tail_chunks(column_tiles, blocks)
    alone_tiles = column_tiles - usual * per_chunk  # none where `usual` is all chunks
    found, active = filtered.columns_by_need(call, saved, jnp.zeros(blocks, jnp.bool_))
    narrow = tile_c // tiles.sparse.tile_c * per_chunk
    work = plan.even_work(active, tiles=narrow, group=tiles.sparse.group)
    target = jnp.where(saved.labels >= 0, found.position[saved.labels], -1)
    # What the last tile lacks is out of bounds, and dropped; so is what a stretch has beyond it.
    beyond = (chunks * per_chunk + max(alone_tiles, 0)) * tile_c - p.v
    order = jnp.pad(found.order, (0, beyond), constant_values=head_rows)
    # The plan before dC is begun: what it is made from then lies where dC will, not beside it.
    first_tile, poison = lax.optimization_barrier((work.first_tile, c.poison))
    work, c = work._replace(first_tile=first_tile), c._replace(poison=poison)
    loop = Loop(call, saved, c, wanted, tiles.sparse, narrow * blocks, work, target, gathered=True)
    shared = Tail(call, saved, c, wanted, loop.padded_d, order, active)
    bias = finite_bias(saved)
    moved: dict[str, Any] = {"ctas": call.ctas, "interpret": call.interpret}
    dhead_ref = None
    if wanted.head:
        dhead_ref = jax.new_ref(lax.empty(saved.head.shape, saved.head.dtype))

    def step(stretch: Stretch, *, both: bool):
        """The step of a loop over a stretch's chunks: with 16-bit tiles, or without."""
        width = stretch.width
        part_ref = jax.new_ref(lax.empty((width, d), saved.head.dtype))

        def body(number, carry):
            dbias, kept, left = carry
            chunk = rows.Chunk(stretch.order, stretch.work.first_tile, number, tile_c)
            ids, mine = chunk.ids(width)
            if both:
                rows.gather(saved.head, chunk, part_ref, **moved)
                part = part_ref[...]
            else:  # 16-bit rows are nobody's operand
                part = saved.head.at[ids].get(mode="clip")
            # The gathered rows of the head have done their work when dC takes their place.
            rest = functools.partial(
                stretch.products, number, part, dh_ref=loop.dh_ref, dc_ref=part_ref
            )
            if both:
                part_bias = None if bias is None else bias.at[ids].get(mode="clip")
                loop.products(number, part_ref, part_bias, part_ref, rest)
            else:
                rest(loop.constant)
            if wanted.head:
                rows.scatter(part_ref, chunk, dhead_ref, **moved)
            if wanted.bias:
                sums = stretch.column_sums()
                sums = loop.column_sums(number, narrow) + sums if both else sums
                ids = jnp.where(mine, ids, head_rows)
                dbias = dbias.at[ids].set(sums, mode="drop")
            if wanted.hidden:
                kept = kept + loop.mass(number, narrow) if both else kept
                left = None if left is None else left + stretch.mass(number)
            return dbias, kept, left

        return body

    zeros = jnp.zeros_like(c.a)
    carry = jnp.zeros(p.v if wanted.bias else 0, jnp.float32), zeros
    carry = *carry, zeros if p.softcap is not None else None
    body = step(Stretch(shared, tiles.tail, jnp.int32(0), column_tiles, low=True), both=True)
    carry = lax.fori_loop(0, usual, body, carry)
    if usual < chunks:
        done = jnp.maximum(cdiv(active.any(1).sum(dtype=jnp.int32), narrow), usual)
        carry = lax.fori_loop(usual, done, body, carry)
        done, carry = lax.optimization_barrier((done, carry))
        stretch = Stretch(shared, tiles.tail_alone, done * per_chunk, alone_tiles, low=False)
        body = step(stretch, both=False)
        carry = lax.fori_loop(0, stretch.chunks, body, carry)
    dbias, kept, left = carry
    if left is None:  # without a cap, what the tiles of 16 bits lack
        left = c.a * jnp.clip(1.0 - kept, 0.0, 1.0)
    dhead = () if dhead_ref is None else dhead_ref[...]
    return Products(loop.dhidden(), dhead, dbias, kept, left)


class Tail:
    """What all chunks share: the tokens' operands in both orders, and what is of one column."""

    def __init__(
        self,
        call: Call,
        saved: Saved,
        c: Coefficients,
        wanted: Wanted,
        padded_d: int,
        order: Int[Array, " columns"],
        active: Bool[Array, "T B"],
    ) -> None:
        p = call.problem
        d = saved.hidden.shape[1]
        self.call, self.saved, self.wanted, self.order = call, saved, wanted, order
        self.live = live_blocks(saved)
        missing = order.shape[0] // call.tiles.sparse.tile_c - active.shape[0]
        self.marked = jnp.pad(active, ((0, missing), (0, 0))).astype(jnp.int32)
        self.scales = s = tail.scales(saved.hidden, saved.live, saved.head, p.v)
        log_epsilon = filtering.log_epsilon("fp8", saved.live, p.v)
        self.most = jnp.reshape(log_epsilon * LOG2E, 1)
        r = tail.row_factors(c, log_epsilon)
        self.inverse = tail.inverse(r)
        self.e8 = padded(tail.quantised(saved.hidden, s.hidden_mean, s.hidden))
        # log2 p, or under a cap what is capped, in nats.
        unit = p.logit_scale * (LOG2E if p.softcap is None else 1.0)
        self.unit = (unit * s.unit).reshape(1)
        lse = c.lse * LOG2E
        centred = saved.hidden.astype(jnp.float32) - s.hidden_mean[None, :]
        row = unit * jnp.dot(centred, s.head_mean, precision="highest")
        kappa = c.kappa if call.dense_smoothing else c.s  # read by nobody
        self.of_rows = (row - lse if p.softcap is None else row, lse, c.a * r, c.s * r, kappa)
        pad = lambda x: jnp.pad(x, (0, padded_d - d))
        self.hidden_factors = self.inverse, pad(s.unit * s.hidden)
        e9, e9_unit = tail.of_tokens(saved.hidden, r)
        self.e9, self.head_factors = interleaved(e9).swapaxes(0, 1), pad(e9_unit)
        # Of all columns at once; a product of matrices would turn the head in 32 bits first.
        column = jnp.sum(saved.head.astype(jnp.float32) * s.hidden_mean[None, :], axis=1)
        column = column * unit
        bias = finite_bias(saved)
        if bias is not None:
            column = column[: p.v] + bias * (unit / p.logit_scale)
        column = jnp.maximum(column, LOWEST).at[order].get(mode="clip")
        self.column = jnp.where(order < p.v, column, LOWEST)


class Stretch:
    """Column tiles from `start` on in chunks of one size: their plan, and buffers for the terms."""

    def __init__(
        self, shared: Tail, tiles: BackwardTiles, start: Int[Array, ""], count: int, *, low: bool
    ) -> None:
        """With `low` products() leaves dC in two parts, which another product is added to."""
        self.shared, self.tiles, self.count = shared, tiles, count
        call, (rows_, d) = shared.call, shared.saved.hidden.shape
        self.blocks, self.per_chunk = rows_ // BLOCK, tiles.slots_per_block
        self.chunks = cdiv(count, self.per_chunk)
        self.width = self.per_chunk * tiles.tile_c
        slots = self.per_chunk * self.blocks
        self.work = plan.dense_work(
            self.blocks,
            shared.live,
            count,
            slots=slots,
            group=tiles.group,
            together=tiles.together(d) * 2,  # of half as many bytes
        )
        halves = tiles.tile_c // call.tiles.sparse.tile_c
        self.order = _part(shared.order, start * tiles.tile_c, count * tiles.tile_c)
        self.marked = _part(shared.marked, start * halves, count * halves)
        self.column = _part(shared.column, start * tiles.tile_c, count * tiles.tile_c)
        self.classes = jnp.reshape(call.problem.v - start * tiles.tile_c, 1)
        empty = lambda shape, dtype: jax.new_ref(lax.empty(shape, dtype))
        self.t_ref = empty((slots * BLOCK, tiles.tile_c), tail.E4M3)
        self.transposed_ref = empty((slots * tiles.tile_c, BLOCK), tail.E4M3)
        self.mass_ref = empty((slots * CONSUMERS * BLOCK,), jnp.float32)
        self.low_ref = None
        if low:
            shape = (self.width, d) if shared.wanted.head else (16, 64)
            self.low_ref = empty(shape, shared.saved.head.dtype)

    def products(
        self,
        number: Int[Array, ""],
        head: BFloat16[Array, "columns D"],
        constant: Float[Array, " padded_d"],
        *,
        dh_ref: Any,
        dc_ref: Any,
    ) -> Any:
        """The terms of a chunk's columns, whose rows are `head`; then dE's part to what dh_ref has,
        and dC's to dc_ref, of which the reference returned has what rounding cuts off."""
        shared, call = self.shared, self.shared.call
        s, at = shared.scales, jnp.asarray(number, jnp.int32).reshape(1)
        options: dict[str, Any] = {
            "tiles": self.tiles,
            "ctas": call.ctas,
            "interpret": call.interpret,
        }
        # Else XLA makes the other order first, and this one from that.
        c8 = lax.optimization_barrier(
            with_layout_constraint(tail.quantised(head, s.head_mean, s.head), Layout((0, 1)))
        )
        tail_terms(
            shared.e8,
            padded(c8),
            Terms(shared.unit, shared.most, self.classes, self.column, *shared.of_rows),
            self.marked,
            self.work,
            at,
            self.t_ref,
            self.transposed_ref,
            self.mass_ref,
            softcap=call.problem.softcap,
            smooth=call.dense_smoothing,
            **options,
        )
        same: dict[str, Any] = {"gathered": True} | options
        if shared.wanted.hidden:
            accumulate_hidden(
                self.t_ref,
                c8.swapaxes(0, 1),
                self.work,
                at,
                dh_ref,
                dense=True,
                factors=shared.hidden_factors,
                **same,
            )
        if shared.wanted.head:
            head_gradient(
                self.transposed_ref,
                shared.e9,
                self.work,
                at,
                constant,
                dc_ref,
                carry=None if self.low_ref is None else (self.low_ref, False, True),
                after=dh_ref if shared.wanted.hidden else None,
                factors=shared.head_factors,
                **same,
            )
        return self.low_ref

    def mass(self, number: Int[Array, ""]) -> Float[Array, " rows"]:
        """Σ_v T of a chunk's columns, by row."""
        by_tile = self.mass_ref[...].reshape(self.per_chunk, self.blocks, CONSUMERS, BLOCK)
        tile = number * self.per_chunk + jnp.arange(self.per_chunk)
        made = (tile < self.count)[:, None] & self._live()[None, :]
        by_tile = jnp.where(made[..., None, None], by_tile, 0.0)
        return by_tile.sum((0, 2)).reshape(-1) * self.shared.inverse

    def column_sums(self) -> Float[Array, " columns"]:
        """Σ_n T of a chunk's columns; of tiles that the last chunk lacks it does not matter."""
        shape = self.per_chunk, self.blocks, -1, BLOCK
        t8 = self.transposed_ref[...].reshape(shape).astype(jnp.float32)
        inverse = interleaved(self.shared.inverse).reshape(self.blocks, BLOCK)
        t8 = jnp.where(self._live()[None, :, None, None], t8, 0.0)
        return (t8 * inverse[None, :, None, :]).sum((1, 3)).reshape(-1)

    def _live(self) -> Bool[Array, " B"]:
        return jnp.arange(self.blocks) < self.shared.live


def padded(x: Array) -> Array:
    """Hidden entries in whole stages."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % STEP)))


def _part(x: Array, start: Int[Array, ""], size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)
