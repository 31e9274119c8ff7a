"""Which probabilities pass a threshold, counted."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.inputs.columns import column_statistics
from benchmarks.inputs.like_models import generate

EPS = 2.0**-12


@pytest.mark.slow
def test_column_statistics_against_every_probability():
    data = generate("smollm", 4000, 64, 1000)
    data = data._replace(hidden=data.hidden[:300])
    mean_hidden = np.asarray(data.hidden, np.float64).mean(0)
    z = np.asarray(data.hidden[:256], np.float64) @ np.asarray(data.head, np.float64).T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    above = p > EPS
    columns = above.reshape(2, 128, 1000).any(1)
    by_mean = columns[:, np.argsort(-np.asarray(data.head, np.float64) @ mean_hidden)]
    found = column_statistics(data.hidden, data.head, eps=EPS)
    assert 0 < found.sorted_tiles <= 1
    assert found.union == {}
    np.testing.assert_allclose(found.elements, above.mean(), rtol=1e-2)
    np.testing.assert_allclose(found.block_columns, columns.mean(), rtol=1e-2)
    for tiles, marks in ((found.tiles, columns), (found.sorted_tiles, by_mean)):
        # Rounding may move an element across ε, and so at most a tile or two of 14.
        assert abs(tiles - marks[:, :896].reshape(2, 7, 128).any(2).mean()) <= 2 / 14


def test_column_statistics_need_a_whole_tile():
    with pytest.raises(ValueError, match="N=127 and V=200"):
        column_statistics(jnp.ones((127, 8)), jnp.ones((200, 8)))
