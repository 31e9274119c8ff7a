"""How the first consumer's sums over its columns reach the second, which adds its own to them.

Where the two consumers of a CTA have the same tokens and different columns, each ends an item with
sums of its own. They are joined here, through a few kilobytes of shared memory: in global memory
they would take twice the partial results.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lsce.backends.hopper.kernels.pipeline import ROW

INTEGERS = ("best",)


def scratch(names: list[str], rows: int) -> dict[str, Any]:
    """Shared memory for the sums of `rows` tokens, and the barriers that guard it."""
    return {
        "sums": {
            name: plgpu.SMEM((rows,), jnp.int32 if name in INTEGERS else jnp.float32)
            for name in names
        },
        "full": plgpu.Barrier(num_arrivals=1),
        "empty": plgpu.Barrier(num_arrivals=1),
    }


def give(sums: dict[str, Any], there: dict[str, Any]) -> None:
    """The first consumer's side; it may give again only after a wait on `there["empty"]`."""
    for name, value in sums.items():
        there["sums"][name][...] = value
    plgpu.barrier_arrive(there["full"])


def take(there: dict[str, Any]) -> dict[str, Any]:
    """The second consumer's side: waits for what the first one gives."""
    plgpu.barrier_wait(there["full"])
    sums = {
        name: plgpu.load(ref, layout=ROW, optimized=False) for name, ref in there["sums"].items()
    }
    plgpu.barrier_arrive(there["empty"])
    return sums


def join(a: dict[str, Any], b: dict[str, Any], k: float) -> dict[str, Any]:
    """The sums over the columns of both; `forward` says what they are, k·x = z·log2 e.

    Each is relative to its own maximum m: l and kept shrink with 2^(k(mᵢ−m)), q with its square,
    and w = Σ p log2 p picks up what the logarithm of p loses.
    """
    m = jnp.maximum(a["m"], b["m"])
    joined: dict[str, Any] = {"m": m}
    for name in a:
        if name == "best":
            # The columns of both lie between each other's: of two equal maxima the first class.
            first = jnp.minimum(a["best"], b["best"])
            higher = jnp.where(a["m"] > b["m"], a["best"], b["best"])
            joined["best"] = jnp.where(a["m"] == b["m"], first, higher)
        elif name != "m":
            joined[name] = relative_to(m, a, name, k) + relative_to(m, b, name, k)
    return joined


def relative_to(m: Any, part: dict[str, Any], name: str, k: float) -> Any:
    """A sum of `part` as it is relative to the maximum m instead of its own."""
    value, lower = part[name], (part["m"] - m) * k
    match name:
        case "s" | "squares":
            return value
        case "l" | "kept":
            return value * jnp.exp2(lower)
        case "q":
            return value * jnp.exp2(2 * lower)
        case "w":
            return (value + lower * part["l"]) * jnp.exp2(lower)
    raise ValueError(f"{name=} is no sum")
