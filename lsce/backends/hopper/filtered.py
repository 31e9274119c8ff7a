"""Filtered gradients: the tiles that hold a marked column, the head's rows gathered for each chunk.

What the filter drops pulls on dE through one row that stands for the dropped ones; in dC it is
dropped (`lsce.sparse.filter` says what that costs). `tail` computes it in 8 bits first, and then
what the tiles hold is added to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsce.backends.hopper.call import Call
from lsce.backends.hopper.chunks import Loop, Products, finite_bias, live_blocks
from lsce.backends.hopper.forward import Saved
from lsce.backends.hopper.kernels import marks, rows
from lsce.sparse import columns, plan
from lsce.sparse import filter as filtering
from lsce.sparse.coefficients import Coefficients
from lsce.sparse.columns import Columns
from lsce.sparse.plan import Work
from lsce.sparse.tokens import BLOCK
from lsce.wanted import Wanted


class Begun(NamedTuple):
    """What the rest leaves beside dE and dC."""

    bias: Float[Array, " V or none"]
    """Σ_n T."""
    tail: Float[Array, " rows"] | None
    """Σ_v T, or None where it is what the tiles lack."""


class Plan(NamedTuple):
    """Which tiles are computed, and in what order."""

    active: Bool[Array, "T B"]
    """The (tile, block) pairs that hold a marked column."""
    work: Work
    target: Int[Array, " rows"]
    """Where the label's column lies in the order, −1 for none."""
    order: Int[Array, " columns"]
    """The columns of whole tiles; what the last tile lacks is out of bounds, and dropped."""


Rest = Callable[[Coefficients, Loop, Any], Begun]
"""Begins dE in the loop's sums and dC in the reference given, by what the tiles leave out."""


def planned(call: Call, saved: Saved, keep_all: Bool[Array, " blocks"]) -> Plan:
    """The tiles that hold a marked column, and all of some blocks of tokens."""
    p, tiles = call.problem, call.tiles.sparse
    found, active = _columns_by_need(call, saved, keep_all)
    work = plan.work(
        active,
        tiles=tiles.width // tiles.tile_c,
        slots=tiles.slots_for(keep_all.size, active.shape[0]),
        group=tiles.group,
    )
    target = jnp.where(saved.labels >= 0, found.position[saved.labels], -1)
    order = jnp.pad(found.order, (0, -p.v % tiles.tile_c), constant_values=saved.head.shape[0])
    return Plan(active, work, target, order)


def products(
    call: Call,
    saved: Saved,
    c: Coefficients,
    wanted: Wanted,
    tiled: Plan,
    rest: Rest | None = None,
) -> Products:
    """The sums over P of the tiles that are computed, added to what `rest` begins."""
    v, tiles = call.problem.v, call.tiles.sparse
    head_rows, d = saved.head.shape
    blocks = saved.hidden.shape[0] // BLOCK
    active, work, target, order = tiled
    width, per_chunk = tiles.width, tiles.width // tiles.tile_c
    slots = tiles.slots_for(blocks, active.shape[0])
    # The plan before dC is begun: what it is made from then lies where dC will, not beside it.
    first_tile, poison = lax.optimization_barrier((work.first_tile, c.poison))
    work, c = work._replace(first_tile=first_tile), c._replace(poison=poison)
    loop = Loop(call, saved, c, wanted, tiles, slots, work, target, gathered=True)
    bias = finite_bias(saved)
    shared: dict[str, Any] = {"ctas": call.ctas, "interpret": call.interpret}
    part_ref = jax.new_ref(lax.empty((width, d), saved.head.dtype))
    dhead_ref, begun = None, Begun(jnp.zeros(v if wanted.bias else 0, jnp.float32), None)
    if wanted.head:
        dhead_ref = jax.new_ref(lax.empty(saved.head.shape, saved.head.dtype))
        if rest is None:
            rows.fill(loop.constant[:d].astype(saved.head.dtype), dhead_ref, **shared)
    if rest is not None:
        begun = rest(c, loop, dhead_ref)

    def body(number, carry):
        dbias, kept = carry
        chunk = rows.Chunk(order, work.first_tile, number, tiles.tile_c)
        rows.gather(saved.head, chunk, part_ref, **shared)
        ids, mine = chunk.ids(width)
        part_bias = None if bias is None else bias.at[ids].get(mode="clip")
        # The gathered rows of the head have done their work when dC takes their place.
        so_far = lambda after: rows.gather(dhead_ref, chunk, part_ref, after=after, **shared)
        loop.products(number, part_ref, part_bias, part_ref, None if rest is None else so_far)
        if wanted.head:
            rows.scatter(part_ref, chunk, dhead_ref, **shared)
        if wanted.bias:
            ids = jnp.where(mine, ids, head_rows)
            sums = dbias.at[ids]
            sums = sums.set if rest is None else sums.add
            dbias = sums(loop.column_sums(number, per_chunk), mode="drop")
        if wanted.hidden:
            kept = kept + loop.mass(number, per_chunk)
        return dbias, kept

    column_tiles = active.shape[0]
    carry = begun.bias, jnp.zeros_like(c.a)
    assert call.epsilon is not None
    more = filtering.more_marked(call.epsilon, call.problem.n, v)
    static = tiles.static_chunks(column_tiles, blocks, slots, more=more)
    carry = lax.fori_loop(0, static, body, carry)
    if static < tiles.most_chunks(column_tiles, blocks, slots):
        carry = lax.fori_loop(static, jnp.maximum(work.chunks, static), body, carry)
    dbias, kept = carry
    dhead = () if dhead_ref is None else dhead_ref[...]
    return Products(loop.dhidden(), dhead, dbias, kept, begun.tail)


def _columns_by_need(
    call: Call, saved: Saved, keep_all: Bool[Array, " blocks"]
) -> tuple[Columns, Bool[Array, "T B"]]:
    """The columns in the order of a backward pass, and the (tile, block) pairs that hold a marked
    one; some blocks keep all."""
    words, tiles = saved.sums.marks, call.tiles
    assert words is not None  # made by the forward of a filtered call
    bits = marks.column_bits(words, tiles.forward.tile_n, saved.live, call.problem.v)
    bits = columns.with_labels(bits, saved.labels, keep_all)
    blocks = saved.hidden.shape[0] // BLOCK
    return columns.order_columns(bits, saved.vocab_order, blocks, tiles.sparse.tile_c)


def flat_blocks(saved: Saved) -> Bool[Array, " blocks"]:
    """The blocks whose tokens spread more of their mass below ε than a filter may take."""
    in_use = jnp.arange(saved.hidden.shape[0]) < saved.live
    kept = jnp.where(in_use, saved.sums.extra["kept"], 1.0).reshape(-1, BLOCK)
    return 1.0 - kept.mean(1) > filtering.FLAT


def mostly_flat(call: Call, saved: Saved, whole: Bool[Array, " blocks"]) -> Bool[Array, ""]:
    """Whether so many blocks would be kept `whole` that 8 bits for all of them are faster.

    A block kept whole takes .8 ms of the 30 that 8 bits take at 8,192 tokens. They help where few
    columns are marked: those are in 16 bits.
    """
    words = saved.sums.marks
    assert words is not None  # made by the forward of a filtered call
    # At most: each warp of the forward's has marks of its own.
    marked = lax.population_count(words.reshape(whole.shape[0], -1)).sum(1, dtype=jnp.int32)
    share = marked / call.problem.v
    helped = whole & (share < 0.1)
    return 2 * helped.sum(dtype=jnp.int32) > live_blocks(saved)


def dropped_pull(
    call: Call, saved: Saved, c: Coefficients, found: Products
) -> tuple[Float[Array, " rows"], Float[Array, " D"] | None]:
    """What the filter dropped of each token, where the tiles kept the rest, and the row of the
    head that it pulls along: None for the mean row, as of a tail, which is relative to that."""
    p, bias = call.problem, finite_bias(saved)
    assert call.epsilon is not None
    if found.tail is not None:
        return found.tail, None
    log_epsilon = filtering.log_epsilon(call.epsilon, saved.live, p.v)
    lse = jnp.where(jnp.isfinite(c.lse), c.lse, 0.0)
    dropped = c.a * jnp.clip(1.0 - found.kept, 0.0, 1.0)
    dropped = dropped * filtering.dropped_slope(p, lse, log_epsilon)
    if bias is None:
        return dropped, None
    count = jnp.maximum(saved.live, 1).astype(jnp.float32)
    mean_hidden = saved.hidden.sum(0, dtype=jnp.float32) / count
    highest = lse.sum() / count + log_epsilon
    return dropped, filtering.stand_in(p, saved.head, bias, mean_hidden, highest)
