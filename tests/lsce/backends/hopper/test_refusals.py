"""What Hopper leaves to other backends because it would not be exact."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lsce
from lsce import backends
from lsce.backends import hopper
from lsce.problem import Problem

BF16 = np.dtype(jnp.bfloat16)
PROBLEM = Problem(
    n=4, d=64, v=256, hidden_dtype=BF16, head_dtype=BF16, platform="gpu", chip="NVIDIA H100"
)


def test_a_logit_scale_that_magnifies_rounding():
    assert hopper.BACKEND.refuses(dataclasses.replace(PROBLEM, logit_scale=1e6)) is None
    large = dataclasses.replace(PROBLEM, logit_scale=1e9)
    assert "logit_scale=1e+09" in (hopper.BACKEND.refuses(large) or "")
    assert backends.choose(large).name == "chunked"


@pytest.mark.parametrize(
    ("implementation", "scale"),
    [
        ("reference", 1e9),
        ("chunked", 1e9),
        pytest.param("hopper", 1e6, marks=pytest.mark.slow),
    ],
)
def test_statistics_at_a_large_logit_scale(implementation, scale):
    """Four classes share the probability: an entropy of ln 4."""
    hidden = jnp.ones((4, 64), jnp.bfloat16)
    head = jnp.full((256, 64), 0.5, jnp.bfloat16).at[:4].set(1.0)
    with hopper.interpreted():
        _, stats = lsce.linear_cross_entropy(
            hidden,
            head,
            jnp.zeros(4, jnp.int32),
            logit_scale=scale,
            return_stats=True,
            implementation=implementation,
        )
    np.testing.assert_allclose(stats.entropy, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(stats.confidence, 0.25, rtol=1e-6)
