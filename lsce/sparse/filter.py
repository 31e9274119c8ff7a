"""What gradient_filter="auto" is: whether to filter, and below which probability.

A block of tokens computes whole tiles of columns, so it keeps more than what exceeds ε; how much
more depends on how many blocks share the tiles' order, and what the rest weighs on how many classes
there are. At one ε the error of dE falls with N and rises with V. With an ε that goes as

    √(N / 8192) · (256000 / V)^(5/8)        N tokens with a loss

it is the same everywhere: at 2^-10.2 of that 0.011 to 0.013 (‖·‖/‖ref‖) for Gemma 3 270M's
activations and SmolLM2 135M's, each at N = 2,048, 8,192 and 32,768 (benchmarks/notes/filter.md).
Naive bfloat16's is 0.012 or 0.013. That was the default. It is now a sixteenth of it, 2^-14.2,
where the filter's part of the error is 0.0020 of dE and 0.0004 of dC for Gemma's, as much as
rounding makes of exact gradients (benchmarks/results/cpu-filter-default.json), for 1.68 matmuls in
place of 1.3 at Gemma 2 2B's head (h200-everywhere.json there).

The reason is training, of which these errors say little. What is dropped is put back in dE, along
one row of the head, and not in dC. A row of dC that no computed tile holds gets nothing of Σ p·E,
only the smoothing's part. Plain SGD does not notice; Adam divides each row by its own size, so that
there these rows step in another direction, and nothing holds them against the smoothing, which
pulls all rows up. With AdamW the loss of Gemma 3 270M ended 3.7% above that of exact gradients at
β = 0.1 with 2^-10.2, and still ended .7% above it with 2^-14 (h200-filter-training.txt there).
Under a softcap training diverged, so that "auto" drops nothing there. Where that matters take
"fp8", `None` or "fused", which drop nothing.

Of fewer than 128,000 classes ε of "auto" rises as 1 / V more, to a quarter of 2^-10.2's at 32,000:
there more classes are some token's, and gradients that drop as little would take longer than naive
optax's (benchmarks/notes/filter.md). For SmolLM2's the parts are 0.0032 and 0.0017 at most.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from lsce import formula
from lsce.problem import Problem

FITTED = 2.0**-10.2
"""ε at 8,192 tokens and 256,000 classes at which the tiles and the loop over chunks were fitted,
once that of "auto". "hidden" has it still, of which no class lacks its gradient."""
FP8 = FITTED / 2
"""That of "fp8". Nothing is dropped below it, but computed in 8 bits; what exceeds it is in 16, a
third more pairs for every halving."""
EPSILON = FITTED / 16
"""That of "auto"."""
FEW_CLASSES = 128_000
"""Below, that of "auto" rises as 1 / V more, up to FP8: of fewer classes more are some token's, and
gradients as exact would take longer than naive optax's."""
LEAST, MOST = 2.0**-13, 2.0**-7
"""What ε stays between; LEAST is that of FITTED, and lower in proportion for "auto"."""

FEW_FOR_8_BITS = 65_536
"""Up to so many classes nearly each is some token's, so that too much is in 16 bits: a forward in 8
computes them again, and the tail in 8 does more work than three products."""

FLAT = 0.4
"""A block of tokens of whose probability more than this part lies below ε is kept whole. At ε of
2^-8 the tiles of one with as much held nine tenths of it, and the error of its dE was 0.02."""

MATMUL_RATE = 7e14
"""Operations a second of a large bfloat16 matmul on an H100, as measured beside these kernels."""


def worthwhile(problem: Problem) -> bool:
    """Whether the products that a filter saves take longer than the work of planning without them.

    Exact gradients cost about 3.3 more matmuls of 2·N·D·V operations; a filter leaves about 0.9 of
    them and adds about 0.3 milliseconds of small kernels, whatever the size.
    """
    return 2.4 * 2 * problem.n * problem.d * problem.v > 3e-4 * MATMUL_RATE


def tail_worthwhile(problem: Problem) -> bool:
    """Whether what is saved by computing in 8 bits what a filter leaves out takes longer than the
    planning: about 1.1 of exact mode's matmuls against 0.6 milliseconds."""
    return 1.1 * 2 * problem.n * problem.d * problem.v > 6e-4 * MATMUL_RATE


def low_forward_worthwhile(problem: Problem) -> bool:
    """Whether a forward in 8 bits saves more than it begins and ends with: 0.3 to 0.4
    matmuls against 0.8 milliseconds, where not nearly every class is some token's."""
    enough = 0.4 * 2 * problem.n * problem.d * problem.v > 8e-4 * MATMUL_RATE
    return enough and problem.v > FEW_FOR_8_BITS


def look_worthwhile(n: int, d: int, v: int) -> bool:
    """Whether to look how flat the tokens are, for which the host waits, about 0.15 milliseconds:
    where that is at most a thirtieth of 1.3 matmuls, less than a filter takes if they are not."""
    return 1.3 * 2 * n * d * v > 30 * 1.5e-4 * MATMUL_RATE


def log_epsilon(
    gradient_filter: float | str, live: Int[Array, ""], v: int
) -> float | Float[Array, ""]:
    """ln ε for `live` tokens with a loss; a number is taken as it is."""
    if not isinstance(gradient_filter, str):
        return math.log(gradient_filter)
    of_one, least = _of_one(gradient_filter, v)
    epsilon = of_one * jnp.sqrt(jnp.maximum(live, 1).astype(jnp.float32))
    return jnp.log(jnp.clip(epsilon, least, MOST))


def _of_one(gradient_filter: str, v: int) -> tuple[float, float]:
    """ε of one token, which rises as the root of their number, and the least it may be."""
    if gradient_filter == "auto":
        usual = min(EPSILON * max(FEW_CLASSES / v, 1.0), FP8)
        least = LEAST * EPSILON / FITTED
    else:
        usual, least = FP8 if gradient_filter == "fp8" else FITTED, LEAST
    return usual * (256_000 / v) ** (5 / 8) / math.sqrt(8192), least


def more_marked(gradient_filter: float | str, n: int, v: int) -> float:
    """How many times as many pairs are marked with n tokens as where the loop over chunks was
    fitted: a third more each time that ε is halved, as counted on activations of two models."""

    def epsilon(name: str) -> float:
        of_one, least = _of_one(name, v)
        return min(max(of_one * math.sqrt(n), least), MOST)

    here = epsilon(gradient_filter) if isinstance(gradient_filter, str) else gradient_filter
    halvings = math.log2(epsilon("hidden") / max(here, LEAST * 2.0**-64))
    return (4 / 3) ** min(max(halvings, 0.0), 64.0)


def stand_in(
    problem: Problem,
    head: BFloat16[Array, "rows D"],
    bias: Float[Array, " V"],
    mean_hidden: Float[Array, " D"],
    highest: Float[Array, ""],
) -> Float[Array, " D"]:
    """The row of the head along which dropped mass pulls, in place of the rows that were dropped.

    Without a bias that is the head's mean row. With one it is the mean by how much of the dropped
    mass each class may have: what the mean token gives it, which for a masked class is nothing, but
    no more than a logit `highest` would, since above that classes are not dropped. Of a class under
    the cap only its slope's part pulls.
    """
    product = jnp.dot(head, mean_hidden.astype(head.dtype), preferred_element_type=jnp.float32)
    z = formula.logits(problem, product[None, : problem.v], bias)[0]
    share = jax.nn.softmax(jnp.minimum(z, highest)) * formula.softcap_slope(problem, z)
    # Under a cap the slope may be 0 for every class; then nothing pulls.
    share = share / jnp.maximum(share.sum(), jnp.finfo(jnp.float32).tiny)
    # Rows beyond the classes are left out by their share: a slice of the head would be a copy.
    share = jnp.pad(share, (0, head.shape[0] - problem.v)).astype(head.dtype)
    return jnp.dot(share, head, preferred_element_type=jnp.float32)


def dropped_slope(
    problem: Problem, lse: Float[Array, " rows"], log_epsilon: float | Float[Array, ""]
) -> Float[Array, " rows"] | float:
    """The softcap's slope at the highest logit that is dropped, lse + ln ε: what of a token's
    dropped mass acts on its hidden state. Most of that mass lies close below."""
    if problem.softcap is None:
        return 1.0
    cap = problem.softcap
    return formula.softcap_slope(problem, jnp.clip(lse + log_epsilon, -cap, cap))
