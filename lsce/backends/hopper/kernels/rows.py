"""Rows from here to there: the head's rows of a chunk, dC's rows back, and one row everywhere.

XLA has all three, but its gather and scatter move a chunk of the greatest size where the device
knows that there is a smaller one, or none, to move, and its broadcast writes at half the memory's
speed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jaxtyping import Array, BFloat16, Bool, Int

from lsce.backends.hopper.kernels.pipeline import launch

WARPGROUPS = 4
TOGETHER = 4
"""Vectors that a thread has on their way at a time."""
VECTOR = 8
"""Entries of a row that a thread moves at a time: 16 bytes."""


class Chunk(NamedTuple):
    """A chunk's columns: a run of whole tiles of an order."""

    order: Int[Array, " ids"]
    """Column ids."""
    first_tile: Int[Array, " chunks"]
    """Where each chunk begins; one more entry than chunks."""
    number: Int[Array, ""]
    tile: int
    """Columns of a tile."""

    def ids(self, most: int) -> tuple[Int[Array, " most"], Bool[Array, " most"]]:
        """Its ids and some that follow, `most` in all, and which of them are its own."""
        first, after = (self.first_tile[self.number + i] * self.tile for i in (0, 1))
        offset = jnp.arange(most, dtype=jnp.int32)
        return self.order.at[first + offset].get(mode="clip"), offset < after - first


def gather(head, chunk: Chunk, chunk_ref, *, after: Any = None, ctas: int, interpret: Any) -> None:
    """chunk_ref[i] = head[id of the chunk's column i]; an id behind the last row stands for that.

    Rows behind the chunk's last stay as they are. `after` is only there to be waited for, as in
    `head_gradient`.
    """
    if interpret is not None:
        ids, _ = chunk.ids(chunk_ref.shape[0])
        chunk_ref[...] = head[...].at[ids].get(mode="clip")
        return
    _move("gather", head, chunk_ref, chunk, ctas, after)


def scatter(chunk_ref, chunk: Chunk, head_ref, *, ctas: int, interpret: Any) -> None:
    """head_ref[id of the chunk's column i] = chunk_ref[i]; passes over ids behind the last row."""
    if interpret is not None:
        ids, mine = chunk.ids(chunk_ref.shape[0])
        to = jnp.where(mine, ids, head_ref.shape[0])
        head_ref[...] = head_ref[...].at[to].set(chunk_ref[...], mode="drop", unique_indices=True)
        return
    _move("scatter", chunk_ref, head_ref, chunk, ctas)


def fill(row: BFloat16[Array, " D"], head_ref, *, ctas: int, interpret: Any) -> None:
    """head_ref[i] = row for every i."""
    if interpret is not None:
        head_ref[...] = jnp.broadcast_to(row[None, :], head_ref.shape)
        return
    _move("fill", row[None, :], head_ref, None, ctas)


def _move(
    kind: str, source, destination_ref, chunk: Chunk | None, ctas: int, after: Any = None
) -> None:
    """Moves a chunk's rows, or without one a row to everywhere."""
    lists, tile = (), 0
    if chunk is not None:
        tile = chunk.tile
        lists = chunk.order, chunk.first_tile, jnp.asarray(chunk.number, jnp.int32).reshape(1)
    _launch(source, lists, destination_ref, after, kind=kind, tile=tile, ctas=ctas)


@functools.partial(jax.jit, static_argnames=("kind", "tile", "ctas"))
def _launch(
    source, lists: tuple[Any, ...], destination_ref, after, *, kind: str, tile: int, ctas: int
) -> None:
    rows, d = destination_ref.shape
    last = source.shape[0] - 1
    vectors, step = d // VECTOR, ctas * WARPGROUPS * 128
    waited = () if after is None else (after,)

    def body(source_gmem, *refs):
        *lists, destination_gmem = refs[: len(refs) - len(waited)]
        first, count, order_gmem = jnp.int32(0), jnp.int32(rows), source_gmem
        if lists:
            order_gmem, first_tile_gmem, chunk_gmem = lists
            first = first_tile_gmem[chunk_gmem[0]] * tile
            count = first_tile_gmem[chunk_gmem[0] + 1] * tile - first
        inline: Any = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),) * 3 + (plgpu.Layout.WG_SPLAT,) * 3
        )

        @inline
        def device_move(_, source, order, destination, first, count, cta):
            i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
            const = lambda value: arith.constant(i32, ir.IntegerAttr.get(i32, value))
            as_index = lambda value: arith.index_cast(index, value)
            vector_type = ir.VectorType.get((VECTOR,), ir.BF16Type.get())
            first, count, cta = (x.registers.item() for x in (first, count, cta))
            here = arith.muli(cta, const(WARPGROUPS * 128))
            here = arith.addi(here, mgpu_utils.thread_idx())
            total = arith.muli(count, const(vectors))
            loop = scf.ForOp(here, total, const(step * TOGETHER))
            with ir.InsertionPoint(loop.body):
                moves = []
                # All loads before the first store, so that they wait together.
                for i in range(TOGETHER):
                    at = arith.addi(loop.induction_variable, const(i * step))
                    inside = arith.cmpi(arith.CmpIPredicate.slt, at, total)
                    at = arith.minsi(at, arith.subi(total, const(1)))
                    row = arith.divui(at, const(vectors))
                    column = as_index(arith.muli(arith.remui(at, const(vectors)), const(VECTOR)))
                    from_ = to = row
                    if kind == "fill":
                        from_ = const(0)
                    else:
                        id_ = memref.load(order, [as_index(arith.addi(first, row))])
                        if kind == "gather":
                            from_ = arith.minsi(id_, const(last))
                        else:
                            to = id_
                            known = arith.cmpi(arith.CmpIPredicate.slt, id_, const(rows))
                            inside = arith.andi(inside, known)
                    value = vector.load(vector_type, source, [as_index(from_), column])
                    moves.append((inside, value, as_index(to), column))
                for inside, value, to, column in moves:
                    with ir.InsertionPoint(scf.IfOp(inside).then_block):
                        vector.store(value, destination, [to, column])
                        scf.yield_([])
                scf.yield_([])

        cta = lax.axis_index("cta")
        device_move(source_gmem, order_gmem, destination_gmem, first, count, cta)

    launch(body, (), ctas=ctas, threads=WARPGROUPS, interpret=None, name=f"lsce_{kind}_rows")(
        source, *lists, destination_ref, *waited
    )
