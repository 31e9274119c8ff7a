"""Exact gradients: all tiles of all blocks with a loss, the head read in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lsce.backends.hopper.call import Call
from lsce.backends.hopper.chunks import Loop, Products, finite_bias, live_blocks
from lsce.backends.hopper.forward import Saved
from lsce.problem import cdiv
from lsce.sparse.coefficients import Coefficients
from lsce.sparse.plan import dense_work
from lsce.sparse.tokens import BLOCK
from lsce.wanted import Wanted


def products(call: Call, saved: Saved, c: Coefficients, wanted: Wanted) -> Products:
    """The sums over P; no probability is left out."""
    v, tiles = call.problem.v, call.tiles.exact
    blocks = saved.hidden.shape[0] // BLOCK
    column_tiles = cdiv(v, tiles.tile_c)
    slots = tiles.slots_for(blocks, column_tiles)
    work = dense_work(
        blocks,
        live_blocks(saved),
        column_tiles,
        slots=slots,
        group=tiles.group,
        together=tiles.together(saved.hidden.shape[1]),
    )
    chunks, per_chunk = work.first_tile.shape[0] - 1, slots // blocks
    loop = Loop(call, saved, c, wanted, tiles, slots, work, saved.labels, gathered=False)
    bias = finite_bias(saved)
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
