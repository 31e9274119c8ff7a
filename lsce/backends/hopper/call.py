"""A call as the kernels take it: what is static of it, and its arrays padded to what TMA reads."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsce.backends import Arrays
from lsce.backends.hopper import choose, interpret
from lsce.backends.hopper.tiles import FusedLayout, Tiles
from lsce.problem import Problem, cdiv
from lsce.sparse import filter as filtering

STAGE = 128
"""8-bit entries of a stage."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call; its arrays are `padded`."""

    problem: Problem
    epsilon: float | Literal["auto", "hidden", "fp8"] | None
    """The filter; those with a name are in `lsce.sparse.filter`, and None is exact."""
    tiles: Tiles
    ctas: int
    low: bool = False
    """Whether the forward has 8-bit operands where that is enough (`eight_bits`)."""
    interpret: Any = None
    """Parameters of Mosaic GPU's interpreter, or None on a GPU."""

    @property
    def filters_head(self) -> bool:
        """Whether the filter, where there is one, is that of dC and db too."""
        return self.epsilon != "hidden"

    @property
    def tail(self) -> bool:
        """Whether what the filter leaves out is computed in 8 bits instead of dropped."""
        return self.epsilon == "fp8"

    @property
    def tail_where_flat(self) -> bool:
        """Whether that is also done where the filter would keep most blocks of tokens whole: in
        large calls, as `tiles.tail_where_flat` has it.

        A bias and a cap leave no bound by which flat tokens would be known to need few columns.
        """
        p = self.problem
        return (
            self.epsilon == "auto"
            and p.softcap is None
            and not p.has_bias
            and self.tiles.tail_where_flat is not None
            and filtering.look_worthwhile(p.n, p.d, p.v)
        )

    @property
    def fused_layout(self) -> FusedLayout | None:
        """Where gradients made in the forward keep P; None where "fp8" makes them afterwards.

        For that they are another way to the same: nothing dropped, errors of exact mode.
        """
        p = self.problem
        return choose.layout_of(p, self.tiles.fused.tile_c, self.ctas)

    @property
    def dense_smoothing(self) -> bool:
        """Smoothing is of rank 1, except under a softcap."""
        return self.problem.softcap is not None and self.problem.label_smoothing > 0.0


def call_of(problem: Problem) -> Call:
    """The filter, tiles and CTAs of a problem on the default GPU, or in the interpreter."""
    epsilon = problem.gradient_filter
    if epsilon in ("auto", "hidden") and problem.softcap is not None:
        epsilon = "fp8"  # `lsce.sparse.filter` says why
    pointless = epsilon in ("auto", "hidden") and not filtering.worthwhile(problem)
    pointless |= epsilon == "fp8" and not filtering.tail_worthwhile(problem)
    if pointless or epsilon in ("fused", 0.0):
        epsilon = None
    ctas = streaming_multiprocessors()
    low = problem.precision == "fp8" and needs_16_bits(problem) is None
    call = Call(problem, epsilon, choose.tiles_for(problem, ctas), ctas, low)
    if interpret.active is not None:
        params, small = interpret.active
        call = dataclasses.replace(call, interpret=params, tiles=small, ctas=interpret.CTAS)
    return call


def needs_16_bits(problem: Problem) -> str | None:
    """Why the forward's operands are of 16 bits though 8 are allowed; None where they are not."""
    if problem.softcap is not None:
        return "a softcap"
    if problem.return_stats:
        return "statistics"
    if problem.gradient_filter == "fused":
        return "fused gradients"
    if not filtering.low_forward_worthwhile(problem):
        return "too few of them, or of classes, for 8 bits to pay"
    return None


def streaming_multiprocessors() -> int:
    """The default GPU's; 132, an H100's, where there is none (lowering without a device)."""
    device = jax.devices()[0]
    return getattr(device, "core_count", None) or 132


def padded(problem: Problem, arrays: Arrays) -> Arrays:
    """The arrays in the form that the kernels take.

    A slice of hidden states, as of a scan over parts of a batch, is copied: XLA would else make one
    step of it and of the kernel that reads it, which finds its place by counting a loop's passes.
    With such a step gradients came out wrong (benchmarks/notes/mistakes-found.md).
    """
    hidden = lax.optimization_barrier(arrays.hidden)
    head = arrays.head.T if problem.head_layout == "dv" else arrays.head
    # TMA's boxes: whole rows of 128 bytes, and more than one group of eight rows.
    hidden, head = _pad(hidden, 8, 64), _pad(head, 8, 64)
    missing = hidden.shape[0] - problem.n
    labels = jnp.pad(arrays.labels, (0, missing), constant_values=-1)
    return arrays._replace(hidden=hidden, head=head, labels=labels)


def copies(problem: Problem) -> str | None:
    """What `padded` copies of the head, if anything, and why: the kernels read whole boxes."""
    why = []
    if problem.head_layout == "dv":
        why.append("head_layout='dv'")
    if problem.v % 8 or problem.v < 16:
        why.append(f"V={problem.v:,} is no multiple of 8 from 16 on")
    if problem.d % 64:
        why.append(f"D={problem.d:,} is no multiple of 64")
    if not why:
        return None
    rows, columns = max(cdiv(problem.v, 8) * 8, 16), cdiv(problem.d, 64) * 64
    size = 2 * rows * columns / 2**20
    return f"copies the head ({size:,.0f} MB), and its gradient too: {', '.join(why)}"


def as_given(problem: Problem, grads: Arrays) -> Arrays:
    """Gradients of arrays that were padded as gradients of those that were given."""
    hidden, head = grads.hidden, grads.head
    if hidden is not None:
        hidden = hidden[: problem.n, : problem.d]
    if head is not None:
        head = head[: problem.v, : problem.d]
        head = head.T if problem.head_layout == "dv" else head
    return grads._replace(hidden=hidden, head=head)


def to_rows(x: Float[Array, " N"], rows: int) -> Float[Array, " rows"]:
    """One value a token, 0 for those that fill up the rows."""
    return jnp.pad(x, (0, rows - x.shape[0]))


def in_stages(x: Array) -> Array:
    """Rows of 8-bit numbers in whole stages of a kernel."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % STAGE)))


def _pad(x: Float[Array, "rows D"], rows: int, columns: int) -> Float[Array, "R C"]:
    """Zeros up to multiples (and at least 16 rows); no copy where nothing is missing."""
    short = (-x.shape[0] % rows, -x.shape[1] % columns)
    short = (max(short[0], 16 - x.shape[0]), short[1])
    return jnp.pad(x, ((0, short[0]), (0, short[1]))) if any(short) else x
