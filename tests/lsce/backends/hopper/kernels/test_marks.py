"""The bits that the forward leaves, against the description of their layout."""

import jax.numpy as jnp
import numpy as np
import pytest
from hopper_on_cpu import words_of

from lsce.backends.hopper.kernels import marks
from lsce.sparse.columns import with_labels
from lsce.sparse.tokens import BLOCK

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_marks_unpack_to_the_columns_they_mean():
    hit = np.random.default_rng(0).random((3, 384)) < 0.05
    np.testing.assert_array_equal(marks.unpack(jnp.asarray(words_of(hit)), 380), hit[:, :380])


def test_column_bits_join_blocks_and_labels():
    rng = np.random.default_rng(0)
    halves = rng.random((6, 256)) < 0.02  # two marks blocks of 64 tokens a block of 128
    labels = rng.integers(-1, 250, 3 * BLOCK).astype(np.int32)
    bits = marks.column_bits(jnp.asarray(words_of(halves)), 64, jnp.int32(2 * BLOCK), 250)
    bits = np.asarray(with_labels(bits, jnp.asarray(labels), jnp.array([False, True, False])))
    expected = halves.reshape(3, 2, 256).any(1)[:, :250]
    expected[2] = False  # beyond the live blocks
    for block, some in enumerate(labels.reshape(3, -1)):
        expected[block, some[some >= 0]] = True
    expected[1] = True  # a flat block
    got = (bits[0][None] >> np.arange(3)[:, None]) & 1
    np.testing.assert_array_equal(got.astype(bool), expected)


def test_words_that_no_row_wrote_are_no_marks():
    """Of 70 tokens in marks of 64 rows: the block's second half has some, the next block none."""
    hit = np.ones((4, 256), bool)
    bits = marks.column_bits(jnp.asarray(words_of(hit)), 64, jnp.int32(70), 250)
    np.testing.assert_array_equal(bits, 1)
    words = jnp.asarray(words_of(np.eye(4, 256, dtype=bool)))
    bits = np.asarray(marks.column_bits(words, 64, jnp.int32(64), 250))
    assert np.flatnonzero(bits[0]).tolist() == [0]
