"""What Hopper leaves to other backends because it would not be exact, and what it copies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsce
from lsce import backends
from lsce.backends import Arrays, hopper
from lsce.backends.hopper.call import copies, padded
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


@pytest.mark.parametrize(
    ("changes", "size", "why"),
    [
        ({"head_layout": "dv"}, "1,125 MB", "'dv'"),
        ({"v": 256_001}, "1,125 MB", "V=256,001"),
        ({"d": 2000}, "1,000 MB", "D=2,000"),
        ({"v": 50_257, "d": 768}, "74 MB", "V=50,257"),
    ],
)
def test_explain_says_what_is_copied(changes, size, why):
    paper = dataclasses.replace(PROBLEM, n=8192, d=2304, v=256_000)
    assert "copies" not in backends.explain(paper).reasons["hopper"]
    said = backends.explain(dataclasses.replace(paper, **changes)).reasons["hopper"]
    assert f"copies the head ({size})" in said
    assert why in said


@pytest.mark.parametrize("changes", [{}, {"head_layout": "dv"}, {"v": 250}, {"d": 60}, {"v": 9}])
def test_the_head_is_copied_where_it_says_so(changes):
    p = dataclasses.replace(PROBLEM, **changes)
    head = jnp.zeros((p.v, p.d) if p.head_layout == "vd" else (p.d, p.v), jnp.bfloat16)
    arrays = Arrays(jnp.zeros((p.n, p.d), jnp.bfloat16), head, jnp.zeros(p.n, jnp.int32))
    made = jax.make_jaxpr(lambda head: padded(p, arrays._replace(head=head)).head)(head)
    read_in_place = made.jaxpr.outvars == made.jaxpr.invars
    assert read_in_place == (copies(p) is None) == (not changes)


def test_explain_says_what_8_bits_are():
    paper = dataclasses.replace(PROBLEM, n=8192, d=2304, v=256_000, gradient_filter="fp8")
    assert "exact" not in backends.explain(paper).reasons["hopper"]
    few = dataclasses.replace(paper, n=2048)
    assert "exact and made in the forward" in backends.explain(few).reasons["hopper"]
    biased = dataclasses.replace(few, has_bias=True)
    assert "exact" not in backends.explain(biased).reasons["hopper"]
    small = dataclasses.replace(PROBLEM, gradient_filter="fp8", has_bias=True)
    assert "gradients are exact: too few" in backends.explain(small).reasons["hopper"]
    assert "fp8" not in backends.explain(PROBLEM).reasons["hopper"]
