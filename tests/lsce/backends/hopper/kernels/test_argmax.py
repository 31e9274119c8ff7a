"""The predicted class, in Mosaic GPU's interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest

import lsce
from lsce.backends import hopper

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
def test_of_equal_logits_the_first_class_is_predicted():
    # Columns 0 to 127 and 256 to 383 are the first consumer's.
    classes = [(300, 140), (140, 20), (290, 270), (450, 390, 300)]
    head = np.zeros((512, 128), np.float32)
    for token, equal in enumerate(classes):
        head[list(equal), token] = 1.0
    hidden = jnp.eye(4, 128, dtype=jnp.bfloat16)
    with hopper.interpreted():
        _, stats = lsce.linear_cross_entropy(
            hidden,
            jnp.asarray(head, jnp.bfloat16),
            jnp.zeros(4, jnp.int32),
            implementation="hopper",
            return_stats=True,
        )
    np.testing.assert_array_equal(stats.prediction, [min(equal) for equal in classes])
