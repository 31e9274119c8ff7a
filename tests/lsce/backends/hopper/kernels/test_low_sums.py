"""The forward's pass in 8 bits, in Mosaic GPU's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from lsce.backends import hopper
from lsce.backends.hopper.kernels import marks
from lsce.backends.hopper.kernels.low_sums import low_sums
from lsce.sparse.tail import e4m3

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
@pytest.mark.parametrize("gap", [None, 2.0])
def test_what_is_small_is_summed_and_what_is_large_is_marked(gap):
    """Three stages, of which the second consumer lags by one; the last tile and block not full."""
    n, d, v, unit = 130, 384, 600, 0.01
    rng = np.random.default_rng(0)
    e8, c8 = (
        e4m3(jnp.asarray(rng.normal(size=size) * 20, jnp.float32)) for size in ((n, d), (v, d))
    )
    column, bound = rng.normal(size=v).astype(np.float32), rng.normal(100, 20, n).astype(np.float32)
    bound[5] = np.inf
    with hopper.interpreted(detect_races=True):
        assert hopper.interpret.active is not None
        params, tiles = hopper.interpret.active
        found = low_sums(
            e8,
            c8,
            jnp.asarray(column),
            jnp.float32(unit),
            jnp.asarray(bound),
            None if gap is None else jnp.float32(gap),
            jnp.int32(n),
            tiles=tiles.forward,
            ctas=hopper.interpret.CTAS,
            interpret=params,
        )
        found = jax.block_until_ready(found)
        jax.effects_barrier()
    assert not gpu_callbacks.get_races().races_found
    x = unit * np.asarray(e8, np.float64) @ np.asarray(c8, np.float64).T + column
    large = x > bound[:, None]
    assert 0.01 < large.mean() < 0.3
    p = np.exp2(np.minimum(x - bound[:, None], 100))
    np.testing.assert_allclose(found.small, np.where(large, 0, p).sum(1), rtol=1e-4)
    starts = range(0, n, 64)

    def of_blocks(hit):
        return np.stack([hit[i : i + 64].any(0) for i in starts])

    live = len(starts)
    np.testing.assert_array_equal(marks.unpack(found.large, v)[:live], of_blocks(large))
    np.testing.assert_array_equal(
        marks.of_any_block(found.large, 64, jnp.int32(n), v), large.any(0)
    )
    if gap is None:
        assert found.below is None
        assert found.marks is None
        return
    above = x > bound[:, None] - gap
    np.testing.assert_allclose(found.below, np.where(above, 0, p).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(marks.unpack(found.marks, v)[:live], of_blocks(above))
