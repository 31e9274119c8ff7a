"""The default filter."""

import jax.numpy as jnp
import numpy as np
import pytest

from lsce.sparse import filter as filtering

pytestmark = pytest.mark.usefixtures("quickly_compiled", "strict_promotion")


def test_the_default_filter_follows_tokens_and_classes():
    def epsilon(live: int, v: int) -> float:
        return float(jnp.exp(filtering.log_epsilon("auto", jnp.int32(live), v)))

    assert epsilon(8192, 256_000) == pytest.approx(filtering.EPSILON, rel=1e-5)
    assert epsilon(2048, 256_000) == pytest.approx(filtering.EPSILON / 2, rel=1e-5)
    assert epsilon(8192, 16_000) == pytest.approx(filtering.EPSILON * 2**2.5, rel=1e-5)
    assert epsilon(0, 10**6) == pytest.approx(filtering.LEAST, rel=1e-5)
    assert epsilon(10**6, 1000) == pytest.approx(filtering.MOST, rel=1e-5)
    assert filtering.log_epsilon(2.0**-9, jnp.int32(1), 7) == pytest.approx(np.log(2.0**-9))
