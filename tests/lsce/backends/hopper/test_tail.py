"""What the filter leaves out, in 8 bits, in Mosaic GPU's interpreter."""

import pytest
from contract import assert_no_worse, assert_stats, case, ours
from hopper_on_cpu import CANDIDATE

from lsce.backends import hopper
from lsce.sparse import filter as filtering

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quickly_compiled")]


@pytest.fixture
def of_any_size(monkeypatch):
    monkeypatch.setattr(filtering, "tail_worthwhile", lambda problem: True)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "spread": 5.0, "weights": True, "z_loss": 1e-3},
        {"label_smoothing": 0.1, "spread": 5.0, "softcap": 15.0, "bias": True},
        {"label_smoothing": 0.1, "spread": 0.1},
    ],
    ids=["peaked", "softcap and bias", "flat"],
)
def test_the_contract(options, of_any_size):
    this = case((150, 64, 600), "bfloat16", **options)
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter="fp8")
    assert_no_worse(got, this)
    assert_stats(got, this, filtered=True)
