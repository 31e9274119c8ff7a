"""The order of the columns: a permutation that brings together those that blocks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lsce.sparse import columns

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_a_given_order_is_that_of_the_active_columns():
    rng = np.random.default_rng(0)
    hit = rng.random(300) < 0.3
    given = rng.permutation(300).astype(np.int32)
    bits = hit[None].astype(np.uint32)
    found, _ = columns.order_columns(jnp.asarray(bits), jnp.asarray(given), 1, 128)
    np.testing.assert_array_equal(np.asarray(found.order)[: hit.sum()], given[hit[given]])


@pytest.mark.parametrize("blocks", [1, 5, 16])
def test_few_blocks_sort_by_short_keys_in_the_same_order(blocks):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**blocks, (2, 4000)).min(0).astype(np.uint32)
    count = lax.population_count(jnp.asarray(bits))
    long = np.asarray(columns._sharing_key(jnp.asarray(bits)[None], count, blocks))
    long = np.where(bits == 0, 2**32 - 1, long.astype(np.int64))
    short = columns._sharing_ranks(blocks)[bits]
    assert short.dtype == np.uint16
    by_long, by_short = (bits[np.argsort(key, kind="stable")] for key in (long, short))
    np.testing.assert_array_equal(by_long, by_short)


def test_columns_are_permuted_so_that_tiles_are_shared():
    rng = np.random.default_rng(0)
    hit = rng.random((40, 1000)) < np.where(np.arange(1000) % 10 == 0, 0.8, 0.01)
    bits = np.zeros((2, 1000), np.uint32)
    for b in range(40):
        bits[b // 32] |= hit[b].astype(np.uint32) << np.uint32(b % 32)
    found, pairs = jax.jit(lambda x: columns.order_columns(x, None, 40, 128))(bits)
    order, pairs = np.asarray(found.order), np.asarray(pairs)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order[np.asarray(found.position)], np.arange(1000))
    padded = np.pad(hit[:, order], ((0, 0), (0, 24)))
    np.testing.assert_array_equal(pairs, padded.reshape(40, 8, 128).any(2).T)
    natural = np.pad(hit, ((0, 0), (0, 24))).reshape(40, 8, 128).any(2).sum()
    assert pairs.sum() < 0.6 * natural
