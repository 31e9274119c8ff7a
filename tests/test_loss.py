"""The contract of the loss, for every backend (see contract.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    CANDIDATES,
    Candidate,
    Case,
    Result,
    assert_no_worse,
    assert_stats,
    case,
    naive,
    ours,
)

import lsce

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all-smoothing": {"label_smoothing": 1.0},
    "sum": {"label_smoothing": 0.1, "reduction": "sum", "weights": True},
    "none": {"label_smoothing": 0.1, "reduction": "none", "weights": True},
    "softcap": {"softcap": 2.0},
    "bias": {"label_smoothing": 0.2, "bias": True},
    "peaked": {"label_smoothing": 0.1, "spread": 8.0},
    "everything": {
        "label_smoothing": 0.1,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "z_loss": 1e-2,
        "bias": True,
        "weights": True,
    },
    "uncapped": {
        "label_smoothing": 0.1,
        "logit_scale": 1.3,
        "z_loss": 1e-2,
        "bias": True,
        "weights": True,
        "reduction": "none",
    },
}


@pytest.fixture(params=CANDIDATES, ids=str)
def candidate(request, monkeypatch):
    request.param.patch(monkeypatch)
    with jax.numpy_dtype_promotion("strict"):
        yield request.param


@pytest.fixture
def loss(candidate):
    """The candidate's `linear_cross_entropy`, exact."""
    return functools.partial(
        lsce.linear_cross_entropy,
        implementation=candidate.implementation,
        gradient_filter=None,
    )


@pytest.fixture
def default(candidate) -> Case:
    """A case for tests about something else than numbers."""
    return case(candidate.shapes[0], candidate.dtypes[0], label_smoothing=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_gradients_and_statistics(candidate, dtype, options):
    if dtype not in candidate.dtypes:
        pytest.skip(f"{candidate} takes no {dtype}")
    this = case(candidate.shapes[0], dtype, **options)
    got = ours(candidate, this.inputs, **this.options)
    assert_no_worse(got, this)
    assert_stats(got, this)
