"""The class of the highest logit, looked for only where a tile holds a new maximum.

Over a stretch of T tiles a row's maximum moves about ln T times. To compare every element with it
in every tile would cost as much as the exponentials, so a warp looks only if one of 8 rows has a
new one; in the WGMMA layout (see `marks`) that takes nothing from other threads but a minimum over
the four lanes that share a row.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf, vector

from lsce.backends.hopper.kernels.pipeline import ROW


def update(best, x, top, before, column0, *, interpret: bool) -> Any:
    """The first column of `x` [rows, columns] that holds `top` [rows], where that is a new maximum.

    `before` is the maximum so far and `best` its class; `column0` is the class of column 0.
    """
    rows, columns = x.shape
    if interpret:
        column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        at = jnp.where(x == top[:, None], column, columns).min(axis=1) + column0
        return jnp.where(top > before, at, best)

    inline: Any = plgpu.inline_mgpu(
        arg_types=(ROW, plgpu.Layout.WGMMA, ROW, ROW, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((rows,), jnp.int32, ROW),
    )

    @inline
    def device_update(_, best, x, top, before, column0):
        i32 = ir.IntegerType.get_signless(32)
        const = lambda value: arith.constant(i32, ir.IntegerAttr.get(i32, value))
        at = lambda reg, i=0: vector.extract(
            reg, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
        )
        out = best.registers.copy()
        lane = arith.andi(mgpu_utils.thread_idx(), const(3))
        first = arith.addi(arith.shli(lane, const(1)), column0.registers.item())
        for row in [(i, 0, h, 0, 0) for i in range(rows // 64) for h in range(2)]:
            highest = at(top.registers[row])
            new = arith.cmpf(arith.CmpFPredicate.OGT, highest, at(before.registers[row]))
            # The same for the four lanes of a row; a warp passes by if it is so for none.
            found: Any = scf.IfOp(new, [i32], has_else=True)
            with ir.InsertionPoint(found.then_block):
                place = const(columns)
                for j in reversed(range(columns // 8)):
                    for c in (1, 0):
                        value = at(x.registers[row[0], j, 0, 0, row[2], 0, 0, 0, 0], c)
                        equal = arith.cmpf(arith.CmpFPredicate.OEQ, value, highest)
                        place = arith.select(equal, const(8 * j + c), place)
                scf.yield_([arith.addi(place, first)])
            with ir.InsertionPoint(found.else_block):
                scf.yield_([const(2**31 - 1)])
            place = found.result
            for distance in (1, 2):
                place = arith.minsi(place, mgpu_utils.shfl_bfly(place, distance))
            kept = at(best.registers[row])
            out[row] = vector.broadcast(best.registers[row].type, arith.select(new, place, kept))
        return FragmentedArray(_registers=out, _layout=best.layout, _is_signed=best.is_signed)

    return device_update(best, x, top, before, column0)
