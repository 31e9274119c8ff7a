"""What gradient_filter="auto" is: whether to filter, and below which probability.

A block of tokens computes whole tiles of columns, so it keeps more than what exceeds ε; how much
more depends on how many blocks share the tiles' order, and what the rest weighs on how many classes
there are. At one ε the error of dE falls with N and rises with V. With

    ε = 2^-10.2 · √(N / 8192) · (256000 / V)^(5/8)        N tokens with a loss

it is the same everywhere: 0.011 to 0.013 (‖·‖/‖ref‖) for Gemma 3 270M's activations and SmolLM2
135M's, each at N = 2,048, 8,192 and 32,768 (benchmarks/NOTES.md). Naive bfloat16's is 0.012 or
0.013.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsce.problem import Problem

EPSILON = 2.0**-10.2
"""ε at 8,192 tokens and 256,000 classes."""
LEAST, MOST = 2.0**-13, 2.0**-7
"""What ε stays between."""

FLAT = 0.4
"""A block of tokens of whose probability more than this part lies below ε is kept whole. By then
its tiles hold nine tenths of it, and the error of its dE is 0.02."""

MATMUL_RATE = 7e14
"""Operations a second of a large bfloat16 matmul on an H100, as measured beside these kernels."""


def worthwhile(problem: Problem) -> bool:
    """Whether the products that a filter saves take longer than the work of planning without them.

    Exact gradients cost about 3.3 more matmuls of 2·N·D·V operations; a filter leaves about 0.5 of
    them and adds about 0.3 milliseconds of small kernels, whatever the size.
    """
    return 2.9 * 2 * problem.n * problem.d * problem.v > 3e-4 * MATMUL_RATE


def log_epsilon(
    gradient_filter: float | str, live: Int[Array, ""], v: int
) -> float | Float[Array, ""]:
    """ln ε for `live` tokens with a loss; a number is taken as it is."""
    if not isinstance(gradient_filter, str):
        return math.log(gradient_filter)
    at_one = EPSILON * (256_000 / v) ** (5 / 8) / math.sqrt(8192)
    epsilon = at_one * jnp.sqrt(jnp.maximum(live, 1).astype(jnp.float32))
    return jnp.log(jnp.clip(epsilon, LEAST, MOST))
