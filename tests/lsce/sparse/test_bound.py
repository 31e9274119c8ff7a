"""The columns that bound a log-sum-exp from below."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from lsce.sparse.bound import most_frequent, of_mean_logit

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


def test_the_mean_logit_bounds_the_log_sum_exp():
    z = np.random.default_rng(0).standard_normal((5, 300)) * np.array([[0, 0.1, 1, 3, 9]]).T
    bound = of_mean_logit(jnp.asarray(z.mean(1)), 300)
    assert (bound <= logsumexp(z, axis=1) + 1e-5).all()
    np.testing.assert_allclose(bound[:2], logsumexp(z[:2], axis=1), atol=0.01)
