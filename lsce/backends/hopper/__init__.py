"""The loss on Hopper GPUs: Pallas kernels for Mosaic GPU (TMA, wgmma, warp specialisation).

`forward.py` makes the losses and `gradients.py` what follows from them, by `exact.py` or
`filtered.py`, both of which loop as `chunks.py` says, with `tail.py` for what a filter leaves out;
`fused.py` makes losses and gradients in one pass. `kernels/` is what runs on the GPU: `pipeline.py`
the loop that all products share, and one kernel a file beside it. `call.py` is the static side of a
call, `choose.py` its tile sizes. What any GPU would share of the filter is in `lsce.sparse`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsce.backends import Arrays, Outputs
from lsce.backends.hopper import choose, interpret
from lsce.backends.hopper.call import (
    Call,
    as_given,
    call_of,
    copies,
    needs_16_bits,
    padded,
    streaming_multiprocessors,
    to_rows,
)
from lsce.backends.hopper.interpret import interpreted, small_tiles
from lsce.problem import Problem
from lsce.wanted import Wanted

__all__ = ["BACKEND", "interpreted", "small_tiles", "streaming_multiprocessors"]

HIGHEST_SOFTCAP = 1000.0
HIGHEST_SCALE = 1e6
MOST_LOGITS = 2**37
"""N·V below which `plan.work` counts in int32, with the widest chunks of `choose.heuristic`."""


class Hopper:
    name = "hopper"
    twice_differentiable = False

    def refuses(self, problem: Problem) -> str | None:
        if interpret.active is None:
            if problem.platform not in ("gpu", "cuda"):
                return f"needs an NVIDIA Hopper GPU; the call is on {problem.platform}"
            if choose.family(problem.chip) not in choose.FAMILIES:
                return f"needs an NVIDIA Hopper GPU (H100, H200, …), not {problem.chip!r}"
        dtypes = problem.hidden_dtype, problem.head_dtype
        if any(dtype != jnp.bfloat16 for dtype in dtypes):
            return "needs bfloat16 hidden and head, not {} and {}; cast them".format(*dtypes)
        if problem.softcap is not None and problem.softcap > HIGHEST_SOFTCAP:
            return (
                f"computes a logit to 1e-7 of the softcap, too little for {problem.softcap:g}:"
                f" at most {HIGHEST_SOFTCAP:g}"
            )
        if problem.logit_scale > HIGHEST_SCALE:
            return (
                f"knows a logit to 1e-7 of its size, which logit_scale={problem.logit_scale:g}"
                f" magnifies: at most {HIGHEST_SCALE:g}"
            )
        if problem.n * problem.v >= MOST_LOGITS:
            return f"counts at most 2^37 logits, not {problem.n:,} × {problem.v:,}"
        return None

    def remark(self, problem: Problem) -> str | None:
        exact = None
        if problem.gradient_filter == "fp8" and self.unfused(problem) is None:
            exact = "gradients of a sum or a mean are exact and made in the forward"
        elif problem.gradient_filter == "fp8" and not call_of(problem).tail:
            exact = "gradients are exact: too few for 8 bits to pay"
        elif problem.gradient_filter in ("auto", "hidden") and problem.softcap is not None:
            exact = "gradients drop nothing: there is a softcap"
        high = None
        if problem.precision == "fp8" and (why := needs_16_bits(problem)):
            high = f"logits in 16 bits: {why}"
        return "; ".join(filter(None, (exact, high, copies(problem)))) or None

    def call(self, problem: Problem) -> Call:
        return call_of(problem)

    # Imported where they are used: without these kernels nothing of Mosaic GPU should load.

    def forward(self, call: Call, arrays: Arrays, *, keep: bool) -> tuple[Outputs, Any]:
        """Losses of N tokens.

        A `vocab_order` replaces the order in which the filtered backward visits the active columns;
        without one it sorts them itself, by which blocks of tokens they are active in.
        """
        from lsce.backends.hopper import forward

        n, arrays = call.problem.n, padded(call.problem, arrays)
        outputs, kept = forward.kept(call, arrays) if keep else (forward.losses(call, arrays), None)
        return jax.tree.map(lambda x: x[:n], outputs), kept

    def backward(
        self, call: Call, kept: Any, wanted: Wanted, g: Float[Array, " N"], mark: Float[Array, ""]
    ) -> Arrays:
        from lsce.backends.hopper.gradients import gradients

        g = to_rows(g, kept.row_of_token.shape[0])
        return as_given(call.problem, gradients(call, kept, wanted, g, mark))

    def unfused(self, problem: Problem) -> str | None:
        from lsce.backends.hopper import fused

        return fused.refuses(call_of(problem))

    def fused(
        self,
        call: Call,
        arrays: Arrays,
        weights: Float[Array, " N"],
        wanted: Wanted,
        mark: Float[Array, ""],
    ) -> tuple[Float[Array, " N"], Arrays]:
        from lsce.backends.hopper import fused

        if call.problem.gradient_filter == "fp8" and not wanted.head:
            # P would have less place without a dC, or none, and a product less to save.
            (losses, _), kept = self.forward(call, arrays, keep=True)
            return losses, self.backward(call, kept, wanted, weights, mark)
        arrays = padded(call.problem, arrays)
        weights = to_rows(weights, arrays.labels.shape[0])
        losses, grads = fused.with_gradients(call, arrays, weights, wanted, mark)
        return losses[: call.problem.n], as_given(call.problem, grads)


BACKEND = Hopper()
