"""The order of the tokens, and their rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from lsce.sparse.tokens import arrange, order_tokens

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LABELS = np.array([3, -1, 4, 5, -1, 6, 7, 8], np.int32)


def test_tokens_that_need_the_same_columns_are_neighbours():
    entropy = np.array([2.9, 0.0, 0.3, 2.1, np.nan, 0.9, np.nan, 99.0], np.float32)
    prediction = np.array([7, 0, 9, 7, 0, 2, 1, 0], np.int32)
    rows = order_tokens(jnp.asarray(LABELS), jnp.asarray(entropy), jnp.asarray(prediction))
    assert np.argsort(np.asarray(rows)).tolist() == [5, 2, 0, 3, 7, 6, 1, 4]


def test_tokens_with_a_loss_come_first_and_nothing_else_is_left_in_the_rows():
    row_of_token = order_tokens(jnp.asarray(LABELS))
    assert np.argsort(np.asarray(row_of_token)).tolist() == [0, 2, 3, 5, 6, 7, 1, 4]
    hidden = jnp.where(jnp.asarray(LABELS)[:, None] < 0, jnp.nan, jnp.arange(8.0)[:, None] + 1)
    rows = arrange(hidden, jnp.asarray(LABELS), row_of_token, 16)
    np.testing.assert_array_equal(rows.hidden[:, 0], [1, 3, 4, 6, 7, 8, *[0] * 10])
    np.testing.assert_array_equal(rows.labels, [3, 4, 5, 6, 7, 8, *[-1] * 10])
    np.testing.assert_array_equal(rows.in_use, np.arange(16) < 6)
    assert rows.live == 6
