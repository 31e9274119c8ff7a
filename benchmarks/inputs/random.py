"""Inputs drawn at random, of two kinds that real text lies between."""

from collections.abc import Callable

import numpy as np

from benchmarks.inputs.arrays import Arrays, Inputs, cast
from benchmarks.inputs.cases import Case


def make(kind: str, case: Case, dtype: str, seed: int = 0) -> Inputs:
    """Random inputs of a kind, one of `KINDS`, the same for the same seed."""
    if kind not in KINDS:
        raise ValueError(f"no random inputs {kind!r}; must be one of {', '.join(KINDS)}")
    return cast(kind, KINDS[kind](case, np.random.default_rng(seed)), dtype)


def flat(case: Case, rng: np.random.Generator) -> Arrays:
    """Logits of standard deviation 1, as of an untrained model: no class stands out."""
    hidden = rng.standard_normal((case.n, case.d), np.float32)
    head = rng.standard_normal((case.v, case.d), np.float32) / np.float32(np.sqrt(case.d))
    return Arrays(hidden, head, rng.integers(0, case.v, case.n))


def peaked(case: Case, rng: np.random.Generator) -> Arrays:
    """Labels with Zipf's frequencies, each hidden state pointing at its label's row of the head.

    The label takes most of a token's probability, and nearly all other classes take none that
    matters. Real text is less tidy.
    """
    hidden, head, _ = flat(case, rng)
    frequency = 1 / np.arange(1, case.v + 1)
    labels = rng.permutation(case.v)[rng.choice(case.v, case.n, p=frequency / frequency.sum())]
    target = head[labels] / np.linalg.norm(head[labels], axis=1, keepdims=True)
    return Arrays(hidden + np.float32(np.log(case.v) + 2) * target, head, labels)


KINDS: dict[str, Callable[[Case, np.random.Generator], Arrays]] = {"flat": flat, "peaked": peaked}
