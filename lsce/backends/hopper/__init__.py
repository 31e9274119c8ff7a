"""The loss on Hopper GPUs: Pallas kernels for Mosaic GPU (TMA, wgmma, warp specialisation).

`engine.py` is the loop that all products share, `forward.py` the kernel over the vocabulary, cut by
`stretches.py`, with `marks.py`, `prediction.py` and `handover.py` in its epilogue. `plan.py` makes
the lists of tiles that the kernels in `backward.py` work off, between rows that `transfer.py`
moves. `loss.py` and `gradients.py` put them together, `fused.py` in another order; `tiles.py` has
the sizes and `filtering.py` the default filter.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsce.backends import Arrays, Outputs
from lsce.backends.hopper import tiles
from lsce.problem import Problem
from lsce.sparse import filter as filtering
from lsce.wanted import Wanted

if TYPE_CHECKING:
    from lsce.backends.hopper.gradients import Call

HIGHEST_SOFTCAP = 1000.0
HIGHEST_SCALE = 1e6
MOST_LOGITS = 2**37
"""N·V below which `plan.work` counts in int32, with the widest chunks of `tiles.heuristic`."""

_interpreter: tuple[Any, tiles.Tiles] | None = None


class Hopper:
    name = "hopper"
    twice_differentiable = False

    def refuses(self, problem: Problem) -> str | None:
        if _interpreter is None:
            if problem.platform not in ("gpu", "cuda"):
                return f"needs an NVIDIA Hopper GPU; the call is on {problem.platform}"
            if tiles.family(problem.chip) not in tiles.FAMILIES:
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

    def call(self, problem: Problem) -> Call:
        return _call(problem)

    # Imported where they are used: without these kernels nothing of Mosaic GPU should load.

    def forward(self, call: Call, arrays: Arrays, *, keep: bool) -> tuple[Outputs, Any]:
        """Losses of N tokens.

        A `vocab_order` replaces the order in which the filtered backward visits the active columns;
        without one it sorts them itself, by which blocks of tokens they are active in.
        """
        from lsce.backends.hopper import loss

        n, arrays = call.problem.n, _padded(call.problem, arrays)
        outputs, kept = loss.kept(call, arrays) if keep else (loss.losses(call, arrays), None)
        return jax.tree.map(lambda x: x[:n], outputs), kept

    def backward(
        self, call: Call, kept: Any, wanted: Wanted, g: Float[Array, " N"], mark: Float[Array, ""]
    ) -> Arrays:
        from lsce.backends.hopper import gradients

        g = _to_rows(g, kept.place.shape[0])
        return _as_given(call.problem, gradients.of(call, kept, wanted, g, mark))

    def unfused(self, problem: Problem) -> str | None:
        from lsce.backends.hopper import fused

        return fused.refuses(_call(problem))

    def fused(
        self,
        call: Call,
        arrays: Arrays,
        weights: Float[Array, " N"],
        wanted: Wanted,
        mark: Float[Array, ""],
    ) -> tuple[Float[Array, " N"], Arrays]:
        from lsce.backends.hopper import fused

        arrays = _padded(call.problem, arrays)
        weights = _to_rows(weights, arrays.labels.shape[0])
        losses, grads = fused.with_gradients(call, arrays, weights, wanted, mark)
        return losses[: call.problem.n], _as_given(call.problem, grads)


BACKEND = Hopper()


def _padded(problem: Problem, arrays: Arrays) -> Arrays:
    """The arrays in the form that the kernels take."""
    head = arrays.head.T if problem.head_layout == "dv" else arrays.head
    # TMA's boxes: whole rows of 128 bytes, and more than one group of eight rows.
    hidden, head = _pad(arrays.hidden, 8, 64), _pad(head, 8, 64)
    missing = hidden.shape[0] - problem.n
    labels = jnp.pad(arrays.labels, (0, missing), constant_values=-1)
    return arrays._replace(hidden=hidden, head=head, labels=labels)


def _as_given(problem: Problem, grads: Arrays) -> Arrays:
    """Gradients of arrays that were padded as gradients of those that were given."""
    hidden, head = grads.hidden, grads.head
    if hidden is not None:
        hidden = hidden[: problem.n, : problem.d]
    if head is not None:
        head = head[: problem.v, : problem.d]
        head = head.T if problem.head_layout == "dv" else head
    return grads._replace(hidden=hidden, head=head)


def _to_rows(x: Float[Array, " N"], rows: int) -> Float[Array, " rows"]:
    return jnp.pad(x, (0, rows - x.shape[0]))


def _call(problem: Problem) -> Call:
    from lsce.backends.hopper.gradients import Call

    epsilon = problem.gradient_filter
    pointless = epsilon == "auto" and not filtering.worthwhile(problem)
    if pointless or epsilon in ("fused", 0.0):
        epsilon = None
    ctas = streaming_multiprocessors()
    call = Call(problem, epsilon, tiles.choose(problem, ctas), ctas)
    if _interpreter is not None:
        interpret, small = _interpreter
        call = dataclasses.replace(call, interpret=interpret, tiles=small, ctas=2)
    return call


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False, tiles: tiles.Tiles | None = None) -> Iterator[None]:
    """Runs the kernels on a CPU, in Mosaic GPU's interpreter, for tests. Slow.

    The interpreter knows no multicast, so the tiles must have clusters of one CTA. A warpgroup that
    waits holds a thread of XLA's pool: with few cores set NPROC=16 before jax starts.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    global _interpreter
    before = _interpreter
    _interpreter = plgpu.InterpretGPUParams(detect_races=detect_races), tiles or small_tiles()
    try:
        yield
    finally:
        _interpreter = before


def small_tiles() -> tiles.Tiles:
    """The smallest tiles: several of each even in a tiny problem."""
    sparse = tiles.BackwardTiles(
        width=256,
        slots=8,
        slots_per_block=2,
        hidden_d=64,
        hidden_splits=2,
        head_d=64,
        steps=2,
        cluster=1,
    )
    exact = dataclasses.replace(sparse, slots_per_block=2, tile_c=256)
    return tiles.Tiles(
        forward=tiles.ForwardTiles(tile_n=64, tile_v=128, steps=2, cluster=1),
        sparse=sparse,
        exact=exact,
        fused=exact,
        hot=128,
    )


def streaming_multiprocessors() -> int:
    """Of the default GPU; 132, an H100's, where there is none (lowering without a device)."""
    device = jax.devices()[0]
    return getattr(device, "core_count", None) or 132


def _pad(x: Float[Array, "rows D"], rows: int, columns: int) -> Float[Array, "R C"]:
    """Zeros up to multiples (and at least 16 rows); no copy where nothing is missing."""
    short = (-x.shape[0] % rows, -x.shape[1] % columns)
    short = (max(short[0], 16 - x.shape[0]), short[1])
    return jnp.pad(x, ((0, short[0]), (0, short[1]))) if any(short) else x
