"""The gradients from what the forward saved: plan, coefficients, and the loop over chunks.

    dz_nv = [(1 + 2λ·lse_n)·p_nv − (1−β)·1[v = y_n] − β/V]·J_nv     (J the softcap's slope, or 1)
    dE_n = g_n·scale·Σ_v dz_nv·C_v      dC_v = Σ_n g_n·scale·dz_nv·E_n      db_v = Σ_n g_n·dz_nv

The softmax and the target's term are in P, made tile by tile; the smoothing is added as rank 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsce import formula
from lsce.backends import Arrays
from lsce.backends.hopper import backward
from lsce.backends.hopper.kernels import rows as transfer
from lsce.backends.hopper.kernels.lse_forward import LOG2E, LOWEST, Sums
from lsce.backends.hopper.tiles import BLOCK, BackwardTiles, Tiles
from lsce.problem import Problem
from lsce.sparse import filter as filtering
from lsce.sparse import plan
from lsce.wanted import Wanted


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call; arrays are padded as `lsce.backends.hopper` says."""

    problem: Problem
    epsilon: float | Literal["auto"] | None
    """The filter; "auto" is `filtering`'s and None exact."""
    tiles: Tiles
    ctas: int
    interpret: Any = None

    @property
    def dense_smoothing(self) -> bool:
        """Smoothing is of rank 1, except under a softcap."""
        return self.problem.softcap is not None and self.problem.label_smoothing > 0.0


class Saved(NamedTuple):
    """What the backward needs of the forward; tokens with a loss come first."""

    hidden: Float[Array, "rows D"]
    head: Float[Array, "head_rows D"]
    bias: Float[Array, " V"] | None
    labels: Int[Array, " rows"]
    vocab_order: Int[Array, " V"] | None
    place: Int[Array, " N"]
    """The row of each token."""
    live: Int[Array, ""]
    sums: Sums


class Coefficients(NamedTuple):
    """One value a row, the cotangent included; 0 in rows without a loss."""

    lse: Float[Array, " rows"]
    """∞ in rows without a loss."""
    a: Float[Array, " rows"]
    """Of p."""
    b: Float[Array, " rows"]
    """Of the target."""
    s: Float[Array, " rows"]
    """Of the smoothing, a column."""
    kappa: Float[Array, " rows"]
    """κ: the part of the smoothing that is the same for every column and added as rank 1."""
    poison: Float[Array, ""]
    """0, or NaN so that all gradients are."""


def of(
    call: Call,
    saved: Saved,
    wanted: Wanted,
    cotangent: Float[Array, " N"],
    mark: Float[Array, ""],
) -> Arrays:
    """Gradients of hidden [N, D], head and bias, None where nobody asked."""
    c = coefficients(call, saved, cotangent, mark)
    make = exact if call.epsilon is None else filtered
    products = make(call, saved, c, wanted)
    dhidden = dbias = None
    if wanted.hidden:
        dhidden = _with_mean_row(call, saved, c, products.hidden, products.kept) + c.poison
        dhidden = dhidden[saved.place].astype(saved.hidden.dtype)
    if wanted.bias and saved.bias is not None:
        scale = call.problem.logit_scale
        dbias = (products.bias - (c.s * c.kappa).sum()) / scale + c.poison
        dbias = dbias.astype(saved.bias.dtype)
    return Arrays(dhidden, products.head if wanted.head else None, None, dbias)


class Products(NamedTuple):
    """Sums over P: rows of dE, dC with the constant row, column sums; () where nobody asked."""

    hidden: Any
    head: Any
    bias: Any
    kept: Float[Array, " rows"]
    """The probability that the computed tiles hold."""


def coefficients(
    call: Call, saved: Saved, cotangent: Float[Array, " N"], mark: Float[Array, ""]
) -> Coefficients:
    p = call.problem
    rows = saved.hidden.shape[0]
    in_use = jnp.arange(rows) < saved.live
    by_row = jnp.zeros(rows, jnp.float32).at[saved.place].set(cotangent)
    g = jnp.where(in_use, by_row, 0.0) * p.logit_scale
    lse = jnp.where(in_use, saved.sums.lse, 0.0)
    # Exact mode leaves all of the smoothing to P where the softcap's slope varies. The filter takes
    # its mean over the columns for those it skips, and P holds the difference for the others.
    kappa = jnp.ones_like(g)
    if call.dense_smoothing:
        kappa = jnp.zeros_like(g)
        if call.epsilon is not None:
            mean_square = jnp.where(in_use, saved.sums.extra["mean_square_logit"], 0.0)
            kappa = formula.softcap_slope(p, jnp.sqrt(mean_square)) * jnp.ones_like(g)
    return Coefficients(
        # Infinite, so that p is 0: exp(z − 0) of a large bias is ∞, and ∞ · 0 would reach dC.
        lse=jnp.where(in_use, lse, jnp.inf),
        a=g * formula.softmax_weight(p, lse),
        b=g * (1.0 - p.label_smoothing),
        s=g * p.label_smoothing / p.v,
        kappa=kappa,
        poison=mark,
    )


def exact(call: Call, saved: Saved, c: Coefficients, wanted: Wanted) -> Products:
    """All tiles of all blocks with a loss, the head read in place."""
    v, tiles = call.problem.v, call.tiles.exact
    blocks = saved.hidden.shape[0] // BLOCK
    column_tiles = -(-v // tiles.tile_c)
    slots = tiles.slots_for(blocks, column_tiles)
    work = plan.whole(
        blocks,
        _live_blocks(saved),
        column_tiles,
        slots=slots,
        group=tiles.group,
        together=tiles.together(saved.hidden.shape[1]),
    )
    chunks, per_chunk = work.first_tile.shape[0] - 1, slots // blocks
    loop = Loop(call, saved, c, wanted, tiles, slots, work, saved.labels, gathered=False)
    bias = _bias(saved)
    bias = None if bias is None else jnp.pad(bias, (0, -v % tiles.tile_c))
    dhead_ref = jax.new_ref(lax.empty(saved.head.shape, saved.head.dtype))
    columns = per_chunk * tiles.tile_c

    def body(chunk, dbias):
        loop.products(chunk, saved.head, bias, dhead_ref)
        if wanted.bias:
            part = loop.column_sums(chunk, per_chunk)
            dbias = lax.dynamic_update_slice(dbias, part, (chunk * columns,))
        return dbias

    # A static number of chunks: XLA then looks at no condition between them.
    dbias = lax.fori_loop(
        0, chunks, body, jnp.zeros(chunks * columns if wanted.bias else 0, jnp.float32)
    )
    kept = jnp.ones_like(c.a)
    return Products(loop.dhidden(), dhead_ref[...] if wanted.head else (), dbias[:v], kept)


def filtered(call: Call, saved: Saved, c: Coefficients, wanted: Wanted) -> Products:
    """The tiles that hold a marked column, the head's rows gathered chunk by chunk."""
    v, tiles = call.problem.v, call.tiles.sparse
    head_rows, d = saved.head.shape
    blocks = saved.hidden.shape[0] // BLOCK
    words = saved.sums.marks
    assert words is not None  # made by the forward of a filtered call
    bits = plan.column_bits(words, call.tiles.forward.tile_n, saved.live, v)
    bits = plan.with_labels(bits, saved.labels, _flat_blocks(saved))
    columns, active = plan.columns(bits, saved.vocab_order, blocks, tiles.tile_c)
    slots = tiles.slots_for(blocks, active.shape[0])
    per_chunk = tiles.width // tiles.tile_c
    work = plan.work(active, tiles=per_chunk, slots=slots, group=tiles.group)
    target = jnp.where(saved.labels >= 0, columns.position[saved.labels], -1)
    # What the last tile lacks is out of bounds, and dropped.
    order = jnp.pad(columns.order, (0, -v % tiles.tile_c), constant_values=head_rows)
    loop = Loop(call, saved, c, wanted, tiles, slots, work, target, gathered=True)
    bias = _bias(saved)
    shared: dict[str, Any] = {"ctas": call.ctas, "interpret": call.interpret}
    part_ref = jax.new_ref(lax.empty((tiles.width, d), saved.head.dtype))
    dhead_ref = None
    if wanted.head:
        dhead_ref = jax.new_ref(lax.empty(saved.head.shape, saved.head.dtype))
        transfer.fill(loop.constant[:d].astype(saved.head.dtype), dhead_ref, **shared)

    def body(number, carry):
        dbias, kept = carry
        chunk = transfer.Chunk(order, work.first_tile, number, tiles.tile_c)
        transfer.gather(saved.head, chunk, part_ref, **shared)
        ids, mine = chunk.ids(tiles.width)
        part_bias = None if bias is None else bias.at[ids].get(mode="clip")
        # The gathered rows of the head have done their work when dC takes their place.
        loop.products(number, part_ref, part_bias, part_ref)
        if wanted.head:
            transfer.scatter(part_ref, chunk, dhead_ref, **shared)
        if wanted.bias:
            ids = jnp.where(mine, ids, head_rows)
            dbias = dbias.at[ids].set(loop.column_sums(number, per_chunk), mode="drop")
        if wanted.hidden:
            kept = kept + loop.mass(number, per_chunk)
        return dbias, kept

    column_tiles = active.shape[0]
    static = tiles.static_chunks(column_tiles, blocks, slots)
    carry = jnp.zeros(v if wanted.bias else 0, jnp.float32), jnp.zeros_like(c.a)
    carry = lax.fori_loop(0, static, body, carry)
    if static < tiles.most_chunks(column_tiles, blocks, slots):
        carry = lax.fori_loop(static, jnp.maximum(work.chunks, static), body, carry)
    dbias, kept = carry
    dhead = () if dhead_ref is None else dhead_ref[...]
    return Products(loop.dhidden(), dhead, dbias, kept)


class Loop:
    """What all chunks share: the buffer of P, the sums of dE, and the three kernels on them."""

    def __init__(
        self,
        call: Call,
        saved: Saved,
        c: Coefficients,
        wanted: Wanted,
        tiles: BackwardTiles,
        slots: int,
        work: plan.Work,
        target: Int[Array, " rows"],
        *,
        gathered: bool,
    ) -> None:
        p = call.problem
        rows, d = saved.hidden.shape
        self.call, self.saved, self.wanted = call, saved, wanted
        self.tiles, self.slots, self.work, self.gathered = tiles, slots, work, gathered
        # Nobody reads κ where smoothing is of rank 1; as a constant it would be filled every chunk.
        kappa = c.kappa if call.dense_smoothing else c.s
        self.vectors = backward.Vectors(c.lse * LOG2E, c.a, c.b, c.s, kappa, target)
        self.options: dict[str, Any] = {
            "tiles": tiles,
            "ctas": call.ctas,
            "interpret": call.interpret,
        }
        padded_d = max(-(-d // tile) * tile for tile in (tiles.hidden_d, tiles.head_d))
        # dL/dC of a column that no tile holds: the smoothing alone, the same for all of them.
        self.constant = jnp.zeros(padded_d, jnp.float32)
        if p.label_smoothing > 0.0 and wanted.head:
            row = jnp.dot(-c.s * c.kappa, saved.hidden.astype(jnp.float32), precision="highest")
            self.constant = jnp.pad(row, (0, padded_d - d))
        self.constant = self.constant + c.poison
        self.p_ref = jax.new_ref(lax.empty((slots * BLOCK, tiles.tile_c), saved.hidden.dtype))
        self.kept_ref = jax.new_ref(lax.empty((slots * BLOCK,), jnp.float32))
        sums = (tiles.hidden_splits, rows, padded_d) if wanted.hidden else (1, 0, 0)
        self.dh_ref = jax.new_ref(jnp.zeros(sums, jnp.float32))

    def products(self, chunk, head, bias, dhead_ref) -> None:
        """P of a chunk and what follows from it; `head` is the whole head or the chunk's rows."""
        p, saved = self.call.problem, self.saved
        at = jnp.asarray(chunk, jnp.int32).reshape(1)
        backward.probabilities(
            saved.hidden,
            head,
            bias,
            self.vectors,
            self.work,
            at,
            self.p_ref,
            self.kept_ref,
            gathered=self.gathered,
            scale=p.logit_scale,
            softcap=p.softcap,
            smooth=self.call.dense_smoothing,
            v=p.v,
            **self.options,
        )
        same: dict[str, Any] = {"gathered": self.gathered} | self.options
        if self.wanted.hidden:
            backward.accumulate_hidden(
                self.p_ref, head, self.work, at, self.dh_ref, dense=not self.gathered, **same
            )
        if self.wanted.head:
            same["after"] = self.dh_ref if self.wanted.hidden else None
            backward.head_gradient(
                self.p_ref, saved.hidden, self.work, at, self.constant, dhead_ref, **same
            )

    def dhidden(self) -> Float[Array, "rows D"]:
        return self.dh_ref[...].sum(0)[:, : self.saved.hidden.shape[1]]

    def column_sums(self, chunk, most: int) -> Float[Array, " columns"]:
        """Σ_n P by column of a chunk's first `most` tiles, 0 for tiles it does not have."""
        work, slots = self.work, self.slots
        t = work.first_tile[chunk] + jnp.arange(most)
        mine = t < work.first_tile[chunk + 1]
        t = jnp.minimum(t, work.tile_slot.shape[0] - 1)
        first, slot = work.tile_slot[t][:, None], jnp.arange(slots)[None, :]
        owns = (slot >= first) & (slot < first + work.of_tile_count[t][:, None]) & mine[:, None]
        sums = self.p_ref[...].reshape(slots, BLOCK, -1).sum(1, dtype=jnp.float32)
        # A slot in no tile of the chunk holds whatever was there. A product joins the slots of a
        # tile and not a scatter, whose order of adding nobody fixes.
        sums = jnp.where(owns.any(0)[:, None], sums, 0.0)
        return jnp.dot(owns.astype(jnp.float32), sums, precision="highest").reshape(-1)

    def mass(self, chunk, most: int) -> Float[Array, " rows"]:
        """The probability that a chunk's tiles hold, by row."""
        work = self.work
        first, after = work.first_of_block[chunk], work.first_of_block[chunk + 1]
        at = first[:, None] + jnp.arange(most)[None, :]
        within = (at < after[:, None])[..., None]
        at = jnp.minimum(at, work.of_block.shape[1] - 1)
        slot = jnp.take_along_axis(work.of_block_slot, at, axis=1)
        by_tile = self.kept_ref[...].reshape(-1, BLOCK)[jnp.clip(slot, 0, self.slots - 1)]
        return jnp.where(within, by_tile, 0.0).sum(1).reshape(-1)


def _with_mean_row(
    call: Call,
    saved: Saved,
    c: Coefficients,
    dhidden: Float[Array, "rows D"],
    kept: Float[Array, " rows"],
) -> Float[Array, "rows D"]:
    """Adds what acts on all columns alike, through rows that stand for the whole head.

    That is the smoothing through the mean row and, in place of the rows it skipped, the mass the
    filter dropped through `filtering.stand_in`.
    """
    p = call.problem
    if call.epsilon is None and p.label_smoothing == 0.0:
        return dhidden
    pull = -c.s * c.kappa * p.v
    center = jnp.mean(saved.head[: p.v], axis=0, dtype=jnp.float32)
    if call.epsilon is None:
        return dhidden + pull[:, None] * center[None, :]
    in_use = jnp.isfinite(c.lse)
    lse = jnp.where(in_use, c.lse, 0.0)
    log_epsilon = filtering.log_epsilon(call.epsilon, saved.live, p.v)
    dropped = c.a * jnp.clip(1.0 - kept, 0.0, 1.0)
    dropped = dropped * filtering.dropped_slope(p, lse, log_epsilon)
    if saved.bias is None:
        return dhidden + (pull + dropped)[:, None] * center[None, :]
    count = jnp.maximum(saved.live, 1).astype(jnp.float32)
    mean_hidden = saved.hidden.sum(0, dtype=jnp.float32) / count
    highest = lse.sum() / count + log_epsilon
    row = filtering.stand_in(p, saved.head, _bias(saved), mean_hidden, highest)
    return dhidden + pull[:, None] * center[None, :] + dropped[:, None] * row[None, :]


def _live_blocks(saved: Saved) -> Int[Array, ""]:
    return (saved.live + BLOCK - 1) // BLOCK


def _flat_blocks(saved: Saved) -> Bool[Array, " blocks"]:
    """The blocks whose tokens spread more of their mass below ε than a filter may take."""
    in_use = jnp.arange(saved.hidden.shape[0]) < saved.live
    kept = jnp.where(in_use, saved.sums.extra["kept"], 1.0).reshape(-1, BLOCK)
    return 1.0 - kept.mean(1) > filtering.FLAT


def _bias(saved: Saved) -> Float[Array, " V"] | None:
    if saved.bias is None:
        return None
    return jnp.maximum(saved.bias.astype(jnp.float32), LOWEST)
