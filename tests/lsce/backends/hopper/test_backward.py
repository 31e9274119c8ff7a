"""The backward kernels in Mosaic GPU's interpreter, in shapes of tiles of their own."""

import dataclasses

import pytest
from contract import assert_no_worse, case, ours
from hopper_on_cpu import CANDIDATE

from lsce.backends import hopper
from lsce.sparse import filter as filtering

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
def test_filtered_by_default_in_tiles_of_two_blocks(monkeypatch):
    this = case((300, 64, 600), "bfloat16", label_smoothing=0.1, spread=8.0)
    small = hopper.small_tiles()
    small = dataclasses.replace(small, sparse=dataclasses.replace(small.sparse, blocks=2))
    monkeypatch.setattr(filtering, "worthwhile", lambda problem: True)
    with hopper.interpreted(tiles=small):
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter="auto")
    assert_no_worse(got, this, slack=3.0)
