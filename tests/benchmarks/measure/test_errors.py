"""Errors of gradients, and the exact ones they are held to."""

import pathlib

import numpy as np
import pytest

from benchmarks.implementations.settings import Settings
from benchmarks.inputs import random
from benchmarks.inputs.arrays import Inputs
from benchmarks.inputs.cases import Case
from benchmarks.measure import errors

SMALL = Case("small", 33, 24, 201)


@pytest.fixture
def small() -> Inputs:
    return random.make("peaked", SMALL, "float32")


def test_relative_error_is_zero_for_the_same_and_one_for_zeros():
    reference = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32)
    assert errors.relative_error(reference, reference) == 0
    assert errors.relative_error(np.zeros_like(reference), reference) == pytest.approx(1)
    assert errors.relative_error(reference * 1.01, reference) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_exact_gradients_are_those_of_float64(small: Inputs, softcap: float | None):
    beta = 0.1
    exact = errors.exact_gradients(small, beta, softcap)
    e, c = (x.astype(np.float64) for x in (small.hidden, small.head))
    raw = e @ c.T
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    dz = p - beta / SMALL.v
    dz[np.arange(SMALL.n), small.labels] -= 1 - beta
    if softcap is not None:
        dz *= 1 - (z / softcap) ** 2
    assert errors.relative_error(exact.hidden, dz @ c / SMALL.n) < 1e-5
    assert errors.relative_error(exact.head, dz.T @ e / SMALL.n) < 1e-5
    # The comparison would notice the smoothing term left out.
    unsmoothed = errors.exact_gradients(small, 0.0, softcap)
    assert errors.relative_error(unsmoothed.hidden, dz @ c / SMALL.n) > 1e-3


def test_a_reference_is_kept_for_the_next_process(tmp_path: pathlib.Path, small: Inputs):
    nobody = errors.Reference(tmp_path, small, compute=False)
    assert nobody(Settings()) is None
    first = errors.Reference(tmp_path, small, compute=True)(Settings(label_smoothing=0.1))
    later = errors.Reference(tmp_path, small, compute=False)(Settings(label_smoothing=0.1))
    assert first is not None
    assert later is not None
    np.testing.assert_array_equal(first.head, later.head)
