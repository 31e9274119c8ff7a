"""How far a filter's gradients are from exact ones, on a CPU: python -m benchmarks.filter_error.

Which tiles the Hopper backend computes follows from its plan, and what it leaves out from them. So
a CPU can say what a filter does to a real model's gradients, in float32, without running a kernel.
ACTIVATIONS are a folder that `benchmarks.extract` wrote, or an .npz file of your own, with arrays
`hidden` [N, D], `head` [V, D] and `labels` [N].

With --tail the pairs left out are computed in 8 bits, as `lsce.sparse.tail` says, and not dropped.
No block then needs to be kept whole.

Two things differ on a GPU: bfloat16 products add an error of about 0.0019 in quadrature, and the
kernel, which knows only the maximum so far, keeps a little more than is counted here.
"""

import dataclasses
import datetime
import functools
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.scipy.special import logsumexp

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.inputs import arrays, real
from benchmarks.measure import report, runner
from benchmarks.measure.errors import relative_error
from lsce.backends.hopper.tiles import Tiles
from lsce.problem import Problem, cdiv
from lsce.sparse import columns
from lsce.sparse import filter as filtering
from lsce.sparse import tail as eight_bits
from lsce.sparse.bound import most_frequent, of_mean_logit
from lsce.sparse.coefficients import Coefficients
from lsce.sparse.tokens import BLOCK, order_tokens

BETA = 0.1


class Row(NamedTuple):
    """What one filter does to one batch; shares in [0, 1], errors ‖g − exact‖ / ‖exact‖."""

    inputs: str
    n: int
    d: int
    v: int
    epsilon: float
    pairs: float
    """Share of the (tile of columns, block of tokens) pairs that are computed."""
    columns: float
    """Share of the columns that some block needs."""
    whole_blocks: int
    """Blocks kept whole, as too much of their probability lies below ε."""
    dropped: float
    """Mean probability a token that no computed tile holds."""
    hidden_error: float
    head_error: float
    rows_left_out: float
    """Share of dC's rows that no computed tile holds: their class never stands out in the batch."""
    rows_norm: float
    """‖·‖ of those rows of the exact dC over ‖dC‖."""
    rows_error: float | None
    """The error of those rows alone; None where there are none."""
    tail: bool
    """Whether what is left out was computed in 8 bits instead of dropped."""
    commit: str
    time: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterFlags(flags.Flags):
    activations: tyro.conf.Positional[
        Annotated[pathlib.Path, shown("ACTIVATIONS", "", help="Of a real model.")]
    ]
    n: Annotated[tuple[int, ...], shown("TOKENS ...")] = (2048,)
    """Numbers of tokens, in whole blocks of 128."""
    v: Annotated[int | None, shown("CLASSES", "all")] = None
    """Only the first so many classes."""
    power: Annotated[tuple[float, ...] | None, shown("POWER ...", "the default filter")] = None
    """ε = 2^POWER, such as -10."""
    tail: bool = False
    """Compute what is left out in 8 bits."""

    def check(self) -> None:
        super().check()
        flags.check_at_least(1, "--n", *self.n)
        flags.check_at_least(1, "--v", self.v)
        for power in self.power or ():
            if not -126 <= power < 0:
                raise ValueError(
                    f"--power must be below 0, as -10 is, and at least -126, not {power:g}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("filter_error", parse, measure_all, arguments)


def parse(arguments: Sequence[str] | None = None) -> FilterFlags:
    return flags.parse(FilterFlags, "filter_error", __doc__, arguments)


def measure_all(options: FilterFlags) -> int:
    rows: list[Row] = []
    for n in options.n:
        found = read(options.activations, n, options.v)
        for power in options.power or [None]:
            usual = "fp8" if options.tail else "auto"
            epsilon = usual if power is None else 2.0**power
            name = options.activations.name
            rows.append(measure(name, found, epsilon, options.commit, tail=options.tail))
            print(line(rows[-1]), flush=True)
            if options.json:
                report.write_json([row._asdict() for row in rows], options.json)
    return 0


def read(path: pathlib.Path, n: int, v: int | None) -> arrays.Arrays:
    """The first n tokens and v classes of a folder or an .npz file."""
    if path.suffix != ".npz":
        return real.read(path, n=n, v=v)
    found = arrays.load(path, "float32")
    return real.first(arrays.Arrays(found.hidden, found.head, found.labels), path, n=n, v=v)


def line(row: Row) -> str:
    return (
        f"{row.inputs}: N, V = {row.n:,}, {row.v:,}: ε = 2^{math.log2(row.epsilon):.2f}, "
        f"{row.pairs:.1%} of the pairs, {row.columns:.1%} of the columns, {row.whole_blocks} whole "
        f"blocks, {row.dropped:.2%} dropped; dE {row.hidden_error:.4f}, dC {row.head_error:.4f}"
        + (
            ""
            if row.rows_error is None
            else f"; {row.rows_left_out:.1%} of dC's rows, {row.rows_norm:.2%} of its norm, are "
            f"left out: {row.rows_error:.2f} of theirs"
        )
    )


def measure(
    name: str,
    found: arrays.Arrays,
    epsilon: float | str,
    commit: str | None = None,
    tile_c: int = Tiles().sparse.tile_c,
    *,
    tail: bool = False,
) -> Row:
    """The errors of a filter on hidden [N, D], head [V, D] and labels [N], N in whole blocks.

    With `tail` those of a filter whose rest is computed in 8 bits.
    """
    n, d = found.hidden.shape
    v = found.head.shape[0]
    if n < 1 or n % BLOCK:
        raise ValueError(f"{n} tokens make no whole blocks of {BLOCK}; take a multiple")
    if not isinstance(epsilon, str) and not 0 < epsilon < 1:
        raise ValueError(f"ε = {epsilon:g} must be above 0 and below 1, as 2^-10 is")
    log_epsilon = filtering.log_epsilon(epsilon, jnp.int32(n), v)
    head = jnp.asarray(found.head, jnp.float32)
    hidden, labels, bound = ordered(jnp.asarray(found.hidden, jnp.float32), head, found.labels)
    center = head.mean(0)
    if tail:
        bound = jnp.maximum(bound, of_mean_logit(hidden @ center, v))

    blocks = n // BLOCK
    lse, kept = np.zeros(n, np.float32), np.zeros(blocks)
    bits = np.zeros((cdiv(blocks, 32), v), np.uint32)
    for block in range(blocks):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        lse[rows], marked, kept[block] = marks(hidden[rows], head, bound[rows], log_epsilon)
        bits[block // 32] |= np.where(marked, np.uint32(1) << np.uint32(block % 32), np.uint32(0))
    whole = (1 - kept > filtering.FLAT) & (not tail)
    needed = columns.with_labels(jnp.asarray(bits), labels, jnp.asarray(whole))
    order, active = columns.order_columns(needed, None, blocks, tile_c)
    tile = np.asarray(order.position) // tile_c

    scales = eight_bits.scales(hidden, jnp.int32(n), head, v) if tail else None
    exact, error = (np.zeros((n, d), np.float32) for _ in range(2))
    exact_head, error_head = jnp.zeros_like(head), jnp.zeros_like(head)
    dropped, left_out = 0.0, np.ones(v, bool)
    for block in range(blocks):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        computed = np.asarray(active)[tile, block]
        left_out &= ~computed
        exact[rows], error[rows], exact_head, error_head, mass = gradients(
            hidden[rows],
            head,
            center,
            labels[rows],
            lse[rows],
            computed,
            exact_head,
            error_head,
            log_epsilon,
            scales,
        )
        dropped += float(mass) / blocks
    rare, rare_error = exact_head[left_out], error_head[left_out]
    return Row(
        inputs=name,
        n=n,
        d=d,
        v=v,
        epsilon=math.exp(log_epsilon),
        pairs=float(active.mean()),
        columns=float((needed != 0).any(0).mean()),
        whole_blocks=int(whole.sum()),
        dropped=dropped,
        hidden_error=relative_error(exact + error, exact),
        head_error=relative_error(exact_head + error_head, exact_head),
        rows_left_out=float(left_out.mean()),
        rows_norm=float(jnp.linalg.norm(rare) / jnp.linalg.norm(exact_head)),
        rows_error=relative_error(rare + rare_error, rare) if left_out.any() else None,
        tail=tail,
        commit=commit or runner.current_commit(),
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def ordered(hidden: Any, head: Any, labels: Any) -> tuple[Any, Any, Any]:
    """The tokens in the backend's order, and the bound of their lse that it knows beforehand."""
    labels = jnp.asarray(labels)
    n, v = len(labels), head.shape[0]
    ids, count = most_frequent(labels, v, min(Tiles().hot, n))
    z = jnp.where(jnp.arange(len(ids)) < count, hidden @ head[ids].T, -jnp.inf)
    lse = logsumexp(z, axis=1)
    p = jnp.exp(z - lse[:, None])
    entropy = lse - jnp.where(p > 0, p * z, 0.0).sum(1)
    rows = order_tokens(labels, entropy, jnp.argmax(z, 1).astype(jnp.int32))
    order = jnp.argsort(rows)
    bound = jnp.maximum(lse, (hidden * head[labels]).sum(1))
    return hidden[order], labels[order], bound[order]


@jax.jit
def marks(hidden: Any, head: Any, bound: Any, log_epsilon: Any) -> tuple[Any, Any, Any]:
    """A block's lse, its marked columns [V], and the mean probability of what lies above ε."""
    z = hidden @ head.T
    lse = logsumexp(z, axis=1)
    above = z > (jnp.maximum(bound, z.max(1)) + log_epsilon)[:, None]
    kept = jnp.where(above, jnp.exp(z - lse[:, None]), 0.0).sum(1)
    return lse, above.any(0), kept.mean()


@functools.partial(jax.jit, donate_argnums=(6, 7))
def gradients(
    hidden: Any,
    head: Any,
    center: Any,
    labels: Any,
    lse: Any,
    computed: Any,
    exact_head: Any,
    error_head: Any,
    log_epsilon: Any,
    scales: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    """A block's exact dE, the filter's error in it, both of dC so far, and the mass left out.

    Without `scales` that is dropped.
    """
    p = jnp.exp(hidden @ head.T - lse[:, None])
    lost = jnp.where(computed[None, :], 0.0, p)
    mass = lost.sum(1)
    target = jax.nn.one_hot(labels, head.shape[0], dtype=p.dtype)
    dz = p - (1 - BETA) * target - BETA / head.shape[0]
    # What is dropped comes back along the mean row, in dE only.
    error = mass[:, None] * center[None, :] - lost @ head
    lost_head = lost.T @ hidden
    if scales is not None:
        tail = eight_bits.emulated(
            problem_of(hidden, head),
            scales,
            coefficients_of(lse, head),
            log_epsilon,
            hidden,
            head,
            None,
            jnp.broadcast_to(~computed, p.shape),
        )
        error, lost_head = error + tail.hidden, lost_head - tail.head
    exact_head, error_head = exact_head + dz.T @ hidden, error_head - lost_head
    return dz @ head, error, exact_head, error_head, mass.mean()


def problem_of(hidden: Any, head: Any) -> Problem:
    (n, d), v = hidden.shape, head.shape[0]
    return Problem(n, d, v, hidden.dtype, head.dtype, "cpu", "", label_smoothing=BETA)


def coefficients_of(lse: Any, head: Any) -> Coefficients:
    """Those of tokens whose losses are summed, one by one."""
    one = jnp.ones_like(lse)
    return Coefficients(lse, one, (1 - BETA) * one, BETA / head.shape[0] * one, one, one[0])


if __name__ == "__main__":
    sys.exit(main())
