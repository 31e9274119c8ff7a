"""Hopper's kernels without a GPU: the candidate of the contract, problems to lower, and marks."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Candidate

from lsce.problem import Problem
from lsce.sparse import columns

CANDIDATE = Candidate("hopper", "interpreted", ("bfloat16",))
H100 = "NVIDIA H100 80GB HBM3"


@contextlib.contextmanager
def sixty_four_bits():
    """For all threads, the interpreter's among them, as `jax.enable_x64` is not."""
    jax.config.update("jax_enable_x64", True)
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield
    finally:
        jax.config.update("jax_enable_x64", False)


def problem(**changes) -> Problem:
    bf16 = np.dtype(jnp.bfloat16)
    base = Problem(
        n=8192, d=2304, v=256000, hidden_dtype=bf16, head_dtype=bf16, platform="gpu", chip=H100
    )
    return dataclasses.replace(base, **changes)


def watched_pairs(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Receives the active (column tile, block) pairs of every backward pass that runs."""
    seen, order_columns = [], columns.order_columns

    def recorded(*args):
        found, pairs = order_columns(*args)
        jax.debug.callback(lambda pairs: seen.append(np.asarray(pairs)), pairs)
        return found, pairs

    monkeypatch.setattr(columns, "order_columns", recorded)
    return seen


def words_of(hit: np.ndarray) -> np.ndarray:
    """Marks words for hit [blocks, V], V a multiple of 128, from the description in marks.py."""
    blocks, v = hit.shape
    words = np.zeros((blocks, 4, v // 32), np.uint32)
    for b, column in zip(*np.nonzero(hit), strict=True):
        group, inside = divmod(int(column), 128)
        j, rest = divmod(inside, 8)
        q, c = divmod(rest, 2)
        words[b, b % 4, group * 4 + q] |= np.uint32(1) << np.uint32(2 * j + c)
    return words.view(np.int32)
