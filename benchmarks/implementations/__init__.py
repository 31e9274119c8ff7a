"""Implementations of the loss to measure, ours and other people's, one file a library.

To add one, write an `Implementation` in a file of its own and name it in `IMPLEMENTATIONS`, and in
the lines of benchmarks/table.py. One that is not installed is skipped; the reason names what to
install.
"""

from benchmarks.implementations import (
    cut_cross_entropy,
    flash_linear_attention,
    jax_cce,
    liger,
    lsce,
    optax,
    quack,
    tokamax,
    torch,
)
from benchmarks.implementations.implementation import FrameworkName, Implementation

IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        *lsce.BACKENDS,
        optax.ONE_HOT,
        optax.INTEGER,
        jax_cce.IMPLEMENTATION,
        tokamax.IMPLEMENTATION,
        torch.EAGER,
        torch.COMPILED,
        cut_cross_entropy.IMPLEMENTATION,
        liger.IMPLEMENTATION,
        liger.CHUNKS,
        liger.CUTE,
        liger.FLCE,
        liger.FLSCE,
        quack.IMPLEMENTATION,
        flash_linear_attention.FLOAT32,
        flash_linear_attention.BFLOAT16,
    )
}
"""The registry, by name."""


def of_framework(framework: FrameworkName) -> dict[str, Implementation]:
    """Those of one framework, by name."""
    return {
        name: implementation
        for name, implementation in IMPLEMENTATIONS.items()
        if implementation.framework == framework
    }
