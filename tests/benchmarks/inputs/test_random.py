"""Random inputs are what their kinds say."""

import numpy as np

from benchmarks.inputs import random
from benchmarks.inputs.arrays import Inputs
from benchmarks.inputs.cases import Case


def test_inputs_repeat_and_differ_by_seed():
    first, again, other = (
        random.make("flat", Case("small", 33, 24, 201), "float32", seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.hidden, again.hidden)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert np.any(first.hidden != other.hidden)


def probabilities(data: Inputs) -> np.ndarray:
    z = data.hidden.astype(np.float64) @ data.head.astype(np.float64).T
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_flat_logits_have_unit_spread_and_no_class_stands_out():
    data = random.make("flat", Case("", 64, 128, 4096), "float32")
    z = data.hidden @ data.head.T
    assert 0.9 < z.std() < 1.1
    assert probabilities(data).max() < 0.05


def test_peaked_labels_take_most_of_the_probability_and_repeat():
    data = random.make("peaked", Case("", 256, 128, 4096), "float32")
    p = probabilities(data)
    assert p[np.arange(256), data.labels].mean() > 0.5
    assert (p > 2**-12).mean() < 0.25
    assert np.bincount(data.labels).max() > 10  # uniform labels would hardly repeat
