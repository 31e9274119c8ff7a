"""The plan of the backward: every active pair once, whatever the marks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsce.backends.hopper import tiles
from lsce.sparse import plan

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def check_work(work: plan.Work, active: np.ndarray, tiles: int, slots: int, group: int):
    """Every active pair is computed once, found by its block and its tile, within the buffers."""
    w = jax.tree.map(np.asarray, work)
    blocks = active.shape[1]
    for c in range(int(w.chunks)):
        first, after = w.first_tile[c], w.first_tile[c + 1]
        assert after - first <= tiles
        computed = {}
        for code in w.items[w.first_item[c] : w.first_item[c + 1]]:
            t, rank = divmod(int(code), blocks)
            assert first <= t < after
            for r in range(rank, rank + group):
                slot = int(w.tile_slot[t]) + r
                assert 0 <= slot < slots
                assert slot not in computed
                computed[slot] = t, int(w.of_tile[t, r])
        wanted = {(t, b) for t, b in np.argwhere(active) if first <= t < after}
        assert wanted <= set(computed.values())
        by_tile = {
            computed[int(w.tile_slot[t]) + r]
            for t in range(first, after)
            for r in range(w.of_tile_count[t])
        }
        by_block = {
            computed[int(w.of_block_slot[b, i])]
            for b in range(blocks)
            for i in range(w.first_of_block[c, b], w.first_of_block[c + 1, b])
        }
        assert by_tile == by_block == wanted
        for b in range(blocks):
            for i in range(w.first_of_block[c, b], w.first_of_block[c + 1, b]):
                assert computed[int(w.of_block_slot[b, i])] == (w.of_block[b, i], b)
    assert not active[w.first_tile[int(w.chunks)] :].any()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_work_covers_the_active_pairs(density, group):
    active = np.random.default_rng(0).random((40, 8)) < density
    active = active[np.argsort(~active.any(1), kind="stable")]
    work = jax.jit(lambda a: plan.work(a, tiles=6, slots=24, group=group))(active)
    check_work(work, active, 6, 24, group)


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(("width", "slots"), [(256, 16), (768, 24), (768, 400), (2048, 24)])
def test_chunks_stay_within_their_bound(density, width, slots):
    sizes = tiles.BackwardTiles(width=width)
    active = np.random.default_rng(0).random((40, 8)) < density
    active = active[np.argsort(~active.any(1), kind="stable")]
    work = plan.work(jnp.asarray(active), tiles=width // 128, slots=slots, group=2)
    most = sizes.most_chunks(40, 8, slots)
    assert work.chunks == most if density == 1 else work.chunks <= most
    assert work.first_tile.shape[0] > most
    assert 1 <= sizes.static_chunks(40, 8, slots) <= most


@pytest.mark.parametrize("together", [1, 2, 3, 9])
@pytest.mark.parametrize("live", [0, 1, 4, 5, 8])
def test_dense_work_covers_the_live_blocks(live, together):
    active = np.broadcast_to(np.arange(8) < -(-live // 2) * 2, (13, 8))
    options = {"slots": 24, "group": 2, "together": together}
    work = jax.jit(lambda n: plan.dense_work(8, n, 13, **options))(live)
    check_work(work, active, 3, 24, 2)


def test_few_groups_at_a_time_go_through_a_chunk():
    """Five groups of two blocks, so three and two at a time; chunks of two and one tile."""
    work = plan.dense_work(10, jnp.int32(10), 3, slots=20, group=2, together=4)
    pairs = [divmod(int(code), 10) for code in work.items]
    assert pairs == [
        *[(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (0, 6), (0, 8), (1, 6), (1, 8)],
        *[(2, 0), (2, 2), (2, 4), (2, 6), (2, 8)],
    ]
