"""The walk over the vocabulary that both forward kernels share: sums a token of a product's tiles.

For a block of tokens and a stretch of the vocabulary (`schedule`) a CTA keeps sums in registers.

The two consumers of a CTA stand side by side: the same tokens, different columns. One of them lags
behind by half of D: a sum may begin anywhere, so it starts each tile with the half that the other
one ends with, and from the same stages of the hidden states. So while one is in its epilogue the
other is in the middle of a tile and keeps the tensor cores busy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsce.backends.hopper import schedule
from lsce.backends.hopper.kernels import combine, marks
from lsce.backends.hopper.kernels.pipeline import Stream, i32, launch, run
from lsce.backends.hopper.tiles import ForwardTiles

AT_A_TIME = 8
"""Columns that the second half of an epilogue takes at a time: two of each thread."""

Update = Callable[[Any, Any, dict[str, Any]], dict[str, Any]]
"""(product of a tile, tile, sums so far) → sums."""


class Stretches:
    """How `live` of n tokens and v classes are cut; `limit` (traced) are fewer classes."""

    def __init__(
        self,
        n: int,
        v: int,
        row_bytes: int,
        live: Int[Array, ""],
        *,
        tiles: ForwardTiles,
        ctas: int,
        limit: Int[Array, ""] | None = None,
    ) -> None:
        self.n, self.v, self.tiles, self.limit = n, v, tiles, limit
        self.unit = tiles.tile_n * tiles.cluster
        self.units = max(ctas // tiles.cluster, 1)
        self.blocks = pl.cdiv(n, self.unit)
        self.v_tiles = pl.cdiv(v, tiles.width)
        self.work = schedule.Schedule.served_by_l2(
            self.blocks, self.unit * row_bytes, self.v_tiles, self.units
        )
        self.cut = self.work.cut((live + self.unit - 1) // self.unit)

    @property
    def rows(self) -> int:
        """Tokens in whole blocks."""
        return self.blocks * self.unit

    @property
    def columns(self) -> int:
        """Classes in whole tiles."""
        return self.v_tiles * self.tiles.width

    @property
    def valid(self) -> Bool[Array, "partials N"]:
        """Which of a token's partial results there are."""
        parts = self.work.parts(self.cut, jnp.arange(self.blocks, dtype=jnp.int32))
        parts = jnp.broadcast_to(parts[:, None], (self.blocks, self.unit))
        parts = parts.reshape(self.rows)[: self.n]
        return jnp.arange(self.work.partials)[:, None] < parts[None, :]

    def sums(
        self,
        hidden: Array,
        head: Array,
        inputs: tuple[Array, ...],
        names: list[str],
        prepare: Callable[..., Callable[[Any], tuple[dict[str, Any], Update]]],
        join: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
        *,
        marked: int,
        interpret: Any,
        name: str,
    ) -> tuple[dict[str, Float[Array, "partials N"]], list[Array]]:
        """The named sums of each stretch, and `marked` arrays of marks.

        prepare(inputs, marks, end of the classes), all in the GPU's memory, returns
        row → (the sums of no column, `Update`) for the block of tokens from that row on; `join`
        adds the first consumer's sums to the second's.
        """
        tiles, work = self.tiles, self.work
        # As many bytes of an operand of 8 bits as of 16.
        stage = tiles.tile_d * 2 // hidden.dtype.itemsize
        k_iters = pl.cdiv(hidden.shape[1], stage)
        lag = k_iters // 2

        def body(e_gmem, c_gmem, *refs):
            inputs_gmem, plan_gmem = refs[: len(inputs)], refs[len(inputs)]
            outputs = refs[len(inputs) + 1 :]
            sums_gmem = dict(zip(names, outputs, strict=False))
            marks_gmem = outputs[len(names) :]
            cta = lax.axis_index("cta")
            member = lax.axis_index("member") if tiles.cluster > 1 else i32(0)
            cut = schedule.Cut(*(plan_gmem[i] for i in range(4)))

            def items(visit, carry):
                count, item = work.items(cut, cta)

                def one(i, carry):
                    partial, block, first, last = item(i)
                    row0 = (block * tiles.cluster + member) * tiles.tile_n
                    return visit((partial, row0, first, last), carry)

                return lax.fori_loop(0, count, one, carry)

            def every_tile(visit, carry):
                def of_item(item, carry):
                    _, row0, first, last = item
                    of_tile = lambda vt, c: visit((row0, vt, first, last), c)
                    # After the last tile come the stages by which the second consumer lags.
                    return lax.fori_loop(first, last + 1 if lag else last, of_tile, carry)

                return items(of_item, carry)

            def length(tile):
                if not lag:
                    return i32(k_iters)
                _, vt, first, last = tile
                return jnp.where(vt < last, k_iters, jnp.where(first < last, lag, 0))

            def copy(tile, k, a_stage, b_stage, barrier):
                row0, vt, first, last = tile
                ks = pl.ds(k * stage, stage)
                plgpu.copy_gmem_to_smem(e_gmem.at[pl.ds(row0, tiles.tile_n), ks], a_stage, barrier)
                # What a consumer skips is copied too, from anywhere: a stage has three copies.
                ends, lags = jnp.minimum(vt, last - 1), jnp.where(k < lag, vt - 1, vt)
                lags = jnp.clip(lags, first, last - 1)
                for i, of in enumerate((ends, lags)):
                    plgpu.copy_gmem_to_smem(
                        c_gmem.at[pl.ds(of * tiles.width + i * tiles.tile_v, tiles.tile_v), ks],
                        b_stage.at[pl.ds(i * tiles.tile_v, tiles.tile_v)],
                        barrier,
                        collective_axes="member" if tiles.cluster > 1 else None,
                    )

            def operands(a, b, wg):
                return a, b.at[pl.ds(wg * tiles.tile_v, tiles.tile_v)].transpose((1, 0))

            stream = Stream(
                steps=tiles.steps,
                a=(tiles.tile_n, stage),
                b=(tiles.width, stage),
                accumulator=(tiles.tile_n, tiles.tile_v),
                length=length,
                copy=copy,
                operands=operands,
                copies=3,
            )

            def consume(consumer, **there):
                wg = consumer.number
                end = self.v if self.limit is None else plan_gmem[4]
                begin = prepare(inputs_gmem, marks_gmem, end)

                def of_item(item, ring):
                    partial, row0, first, last = item
                    start, update = begin(row0)

                    def of_tile(vt, carry):
                        ring, old = carry
                        acc, ring = consumer.multiply((row0, vt, first, last), ring)
                        return ring, update(acc, 2 * vt + wg, old)

                    behind = jnp.where(first < last, lag, 0)
                    ring = consumer.skip(wg * behind, ring)
                    ring, sums = lax.fori_loop(first, last, of_tile, (ring, start))

                    @pl.when(wg == 0)
                    def _():
                        combine.give(sums, there)

                    ring = consumer.skip((1 - wg) * behind, ring)

                    @pl.when(wg == 0)
                    def _():
                        plgpu.barrier_wait(there["empty"])

                    @pl.when(wg == 1)
                    def _():
                        joined = join(combine.take(there), sums)
                        for name in names:
                            sums_gmem[name][partial, pl.ds(row0, tiles.tile_n)] = joined[name]

                    return ring

                items(of_item, i32(0))

            run(
                stream,
                hidden.dtype,
                tiles=every_tile,
                consume=consume,
                cluster=tiles.cluster > 1,
                scratch=combine.scratch(names, tiles.tile_n),
            )

        shape = work.partials, self.rows
        words = self.v_tiles * marks.words(tiles.width)
        out_type = [
            jax.ShapeDtypeStruct(shape, jnp.int32 if x in combine.INTEGERS else jnp.float32)
            for x in names
        ]
        out_type += [
            jax.ShapeDtypeStruct((self.rows // tiles.tile_n, 4, words), jnp.int32)
        ] * marked
        outputs = launch(
            body,
            out_type,
            ctas=self.units,
            cluster=tiles.cluster,
            interpret=interpret,
            name=name,
        )(
            hidden,
            head,
            *inputs,
            jnp.stack([*self.cut, i32(self.v if self.limit is None else self.limit)]),
        )
        parts = {name: x[:, : self.n] for name, x in zip(names, outputs, strict=False)}
        return parts, list(outputs[len(names) :])


def summed(x: Any, terms: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Each of the terms of x by row, made and added a few columns at a time.

    An epilogue takes as long as its exponentials. In this order the compiler puts all else between
    them; the shuffles that end a sum would hold it up.
    """
    total = {}
    for start in range(0, x.shape[1], AT_A_TIME):
        new = terms(x[:, start : start + AT_A_TIME])
        total = {name: total[name] + new[name] for name in new} if total else new
    return {name: value.sum(axis=1) for name, value in total.items()}
