"""How the forward cuts its work: everything once, evenly, and its pieces put together again."""

import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_no_worse, assert_stats, case, ours
from hopper_on_cpu import CANDIDATE

from lsce.backends import hopper
from lsce.backends.hopper import schedule, tiles

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.parametrize("tiles_", [1, 193])
@pytest.mark.parametrize("blocks", [0, 5, 23, 32, 67, 130])
@pytest.mark.parametrize(("units", "together"), [(2, 2), (2, 1), (66, 66), (66, 22), (66, 11)])
def test_items_cover_everything_once_and_evenly(blocks, tiles_, units, together):
    work = schedule.Schedule(blocks, tiles_, units, together)
    cut = work.cut(blocks)
    at_most = 130 // together + 132  # the same for all numbers of blocks, as are the shapes
    unit, i = np.meshgrid(np.arange(units), np.arange(at_most), indexing="ij")
    unit, i = jnp.asarray(unit, jnp.int32), jnp.asarray(i, jnp.int32)
    count, item = work.items(cut, unit)
    partial, block, first, after = (np.asarray(x)[np.asarray(i < count)] for x in item(i))
    assert np.asarray(count).max() <= at_most

    covered = np.zeros((blocks, tiles_), int)
    for b, f, a in zip(block, first, after, strict=True):
        covered[b, f:a] += 1
    np.testing.assert_array_equal(covered, 1)
    parts = np.asarray(work.parts(cut, jnp.arange(blocks, dtype=jnp.int32)))
    for b in range(blocks):
        assert sorted(partial[block == b]) == list(range(parts[b]))
    assert parts.max(initial=0) <= work.partials
    load = np.zeros(units, int)
    np.add.at(load, np.asarray(unit)[np.asarray(i < count)], after - first)
    if cut.rest == 0 or cut.splits == units // cut.rest:
        assert load.max() <= blocks * tiles_ / units + 2 + blocks // together
    else:  # so much memory for partial results is not to be had
        assert blocks < together or together == units or tiles_ == 1


@pytest.mark.parametrize(
    ("d", "tiles_", "together"),
    [(640, 1000, 66), (2304, 1000, 22), (4096, 501, 11), (8192, 501, 11), (4096, 125, 22)],
)
def test_as_many_blocks_at_a_time_as_the_l2_serves(d, tiles_, together):
    assert schedule.Schedule.served_by_l2(128, 256 * d * 2, tiles_, 66).together == together


def test_units_that_divide_by_nothing_take_a_block_each():
    assert schedule.Schedule.served_by_l2(128, 256 * 4096 * 2, 1000, 61).together == 61


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [None, 2.0**-12])
def test_few_blocks_at_a_time(epsilon, monkeypatch):
    """Both CTAs have a stretch of every block."""
    of = schedule.Schedule.served_by_l2
    works = []
    monkeypatch.setattr(
        schedule.Schedule, "served_by_l2", lambda *a: works.append(of(*a)) or works[-1]
    )
    monkeypatch.setattr(tiles, "L2", 1)
    monkeypatch.setattr(schedule, "SHORTEST", 1)
    this = case((150, 64, 600), "bfloat16", label_smoothing=0.1, spread=5.0)
    with hopper.interpreted():
        got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=epsilon)
    assert (works[-1].round_splits, works[-1].together) == (2, 1)
    assert works[-1].blocks > 2
    assert_no_worse(got, this, slack=1.0 if epsilon is None else 3.0)
    assert_stats(got, this, filtered=epsilon is not None)
