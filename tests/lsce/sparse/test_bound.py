"""The columns that bound a log-sum-exp from below."""

import jax.numpy as jnp
import numpy as np
import pytest

from lsce.sparse.bound import most_frequent

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.parametrize("v", [2, 1000, 262144])
def test_hot_columns_are_the_most_frequent_labels(v):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(500) < 0.2, -1, (rng.zipf(1.3, 500) - 1) % v).astype(np.int32)
    ids, count = most_frequent(jnp.asarray(labels), v, 64)
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    expected = values[np.lexsort((values, -counts))][:64]
    assert count == len(expected)
    np.testing.assert_array_equal(ids[: len(expected)], expected)
