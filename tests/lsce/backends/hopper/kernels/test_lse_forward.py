"""The forward kernel in Mosaic GPU's interpreter, in shapes of tiles of its own."""

import dataclasses

import pytest
from contract import assert_no_worse, assert_stats, case, ours
from hopper_on_cpu import CANDIDATE

from lsce.backends import hopper

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "shape", "options", "epsilon"),
    [
        # Three stages a tile, of which the second consumer lags by one, and three column tiles.
        ({}, (130, 192, 600), {"label_smoothing": 0.1, "z_loss": 1e-2, "weights": True}, None),
        (
            {"tile_n": 128, "tile_d": 32},
            (150, 128, 520),
            {"label_smoothing": 0.1, "spread": 5.0, "softcap": 15.0, "bias": True},
            2.0**-12,
        ),
        ({}, (150, 128, 600), {"label_smoothing": 0.1, "spread": 5.0}, 2.0**-12),
        ({"tile_v": 256}, (70, 128, 600), {"label_smoothing": 0.1, "spread": 5.0}, 2.0**-12),
        # One stage, so no lag; no column for the second consumer.
        ({}, (1, 64, 2), {}, None),
    ],
)
def test_consumers_half_a_tile_apart(changes, shape, options, epsilon):
    this = case(shape, "bfloat16", **options)
    small = hopper.small_tiles()
    small = dataclasses.replace(small, forward=dataclasses.replace(small.forward, **changes))
    with hopper.interpreted(tiles=small):
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=epsilon)
    assert_no_worse(got, this, slack=3.0)
    assert_stats(got, this, filtered=epsilon is not None)
