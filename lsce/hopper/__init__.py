"""The loss on Hopper GPUs: Pallas kernels for Mosaic GPU (TMA, wgmma, warp specialisation).

`forward.py` is the pass over the vocabulary, `backward.py` the gradients' products, `plan.py` the
lists of tiles between them, `engine.py` the loop that all kernels share, `loss.py` the custom_vjp
that ties them together, `tiles.py` the tile sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsce.hopper import tiles
from lsce.problem import Problem
from lsce.stats import TokenStats

CHIPS = ("H100", "H200", "H800", "H20", "GH200")
EPSILON = 2.0**-10
"""The filter of gradient_filter="auto". On Gemma 3 270M's activations the error of dE is 0.0096 and
that of dC 0.0039 (‖·‖/‖ref‖), below the 0.011 of a naive bfloat16 loss; benchmarks/NOTES.md."""

_interpreter: tuple[Any, tiles.Tiles] | None = None


class Hopper:
    name = "hopper"

    def refuses(self, problem: Problem) -> str | None:
        if _interpreter is None:
            if problem.platform not in ("gpu", "cuda"):
                return f"needs an NVIDIA Hopper GPU; the call is on {problem.platform}"
            if not any(chip in problem.chip for chip in CHIPS):
                return f"needs an NVIDIA Hopper GPU (H100, H200, …), not {problem.chip!r}"
        dtypes = problem.hidden_dtype, problem.head_dtype
        if any(dtype != jnp.bfloat16 for dtype in dtypes):
            return "needs bfloat16 hidden and head, not {} and {}".format(*dtypes)
        if problem.n == 0:
            return "has nothing to do without tokens"
        return None

    def token_losses(
        self,
        problem: Problem,
        hidden: Float[Array, "N D"],
        head: Float[Array, "V D"] | Float[Array, "D V"],
        labels: Int[Array, " N"],
        bias: Float[Array, " V"] | None,
        vocab_order: Int[Array, " V"] | None,
    ) -> tuple[Float[Array, " N"], TokenStats | None]:
        """Losses of N tokens; `vocab_order` has no use here, the backward sorts by itself."""
        # Imported here: on a machine without these kernels nothing of Mosaic GPU should load.
        from lsce.hopper.loss import Call, token_losses

        del vocab_order
        epsilon = problem.gradient_filter
        if epsilon == "auto":
            epsilon = EPSILON
        elif epsilon in ("fused", 0.0):
            epsilon = None
        call = Call(problem, epsilon, tiles.choose(problem), streaming_multiprocessors())
        if _interpreter is not None:
            interpret, small = _interpreter
            call = dataclasses.replace(call, interpret=interpret, tiles=small, ctas=2)
        if problem.head_layout == "dv":
            head = head.T
        # TMA's boxes: whole rows of 128 bytes, and more than one group of eight rows.
        hidden = _pad(hidden, max(8, 16 - problem.n), 64)
        head = _pad(head, max(8, 16 - problem.v), 64)
        labels = jnp.pad(labels, (0, hidden.shape[0] - problem.n), constant_values=-1)
        losses, stats = token_losses(call, hidden, head, bias, labels)
        return jax.tree.map(lambda x: x[: problem.n], (losses, stats))


BACKEND = Hopper()


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False, tiles: tiles.Tiles | None = None) -> Iterator[None]:
    """Runs the kernels on a CPU, in Mosaic GPU's interpreter, for tests. Slow.

    The interpreter knows no multicast, so the tiles must have clusters of one CTA.
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
        width=256, slots=8, slots_per_block=2, hidden_d=64, head_d=64, steps=2, cluster=1
    )
    return tiles.Tiles(
        forward=tiles.ForwardTiles(tile_v=128, steps=2, cluster=1),
        sparse=sparse,
        exact=sparse,
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
