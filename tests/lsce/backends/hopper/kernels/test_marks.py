"""The bits that the forward leaves, against the description of their layout."""

import jax.numpy as jnp
import numpy as np
import pytest
from hopper_on_cpu import words_of

from lsce.backends.hopper.kernels import marks

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_marks_unpack_to_the_columns_they_mean():
    hit = np.random.default_rng(0).random((3, 384)) < 0.05
    np.testing.assert_array_equal(marks.unpack(jnp.asarray(words_of(hit)), 380), hit[:, :380])
