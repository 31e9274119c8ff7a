"""Single entries of P: those of the targets, where they become known after the tiles are made."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
from jax import lax

from lsce.backends.hopper.kernels.pipeline import i32, launch, share


@functools.partial(jax.jit, static_argnames=("ctas", "interpret"))
def change_entries(p_ref, row, column, value, *, ctas: int, interpret: Any) -> None:
    """p_ref[row[i], column[i]] = value[i], where row[i] ≥ 0; no two the same, in place."""
    n = row.shape[0]

    def body(row_gmem, column_gmem, value_gmem, p_gmem):
        cta, num = lax.axis_index("cta"), lax.axis_size("cta")

        @pl.when(lax.axis_index("wg") == 0)
        def _():
            @pl.loop(0, share(i32(n), num, cta))
            def _(i):
                at = cta + i * num
                row = row_gmem[at]

                @pl.when(row >= 0)
                def _():
                    p_gmem[row, column_gmem[at]] = value_gmem[at].astype(p_ref.dtype)

    launch(body, (), ctas=ctas, interpret=interpret, name="lsce_change_entries")(
        row, column, value, p_ref
    )
