"""The terms of a tail as a kernel makes them, on a GPU or in the interpreter, and as they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsce.backends.hopper.kernels.lse_forward import LOG2E
from lsce.backends.hopper.kernels.tail_terms import NO_CLASS, Terms, interleaved, tail_terms
from lsce.backends.hopper.tiles import BackwardTiles
from lsce.sparse import plan, tail

LOG2_EPSILON = 1.5


def assert_terms(
    tiles: BackwardTiles, cap: float | None, *, most: float, interpret: Any = None
) -> None:
    """At most so large a share of T₈ differs, by a rounding; the second order holds the same.

    Of one column p is infinite in 8 bits: it is ε where it counts, and nothing where it does not.
    """
    n, d, v = 256, 128, 600
    blocks, per_chunk, columns = n // 128, 2, 512
    rng = np.random.default_rng(0)
    e8, c8, column, row = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((n, d), (columns, d), (3 * 256,), (n,))
    )
    e8, c8, one = tail.e4m3(20 * e8), tail.e4m3(20 * c8), jnp.ones(n)
    column = jnp.where(jnp.arange(3 * 256) < v, column, NO_CLASS).at[7].set(1e4)
    terms = Terms(
        jnp.full(1, 3e-4),
        jnp.full(1, LOG2_EPSILON),
        column,
        row,
        one * 3,
        one * 1.5,
        one * 0.1,
        one * 0.5,
    )
    elsewhere = rng.random((blocks, 3 * 256)) < 0.3
    kept = jnp.asarray((elsewhere << np.arange(blocks)[:, None]).sum(0, keepdims=True), jnp.int32)
    slots = per_chunk * blocks
    work = plan.dense_work(blocks, jnp.int32(blocks), 3, slots=slots, group=tiles.group, together=1)

    @jax.jit
    def chunk(e8, c8, terms, kept):
        refs = [
            jax.new_ref(lax.empty(shape, dtype))
            for shape, dtype in (
                ((slots * 128, 256), tail.E4M3),
                ((slots * 256, 128), tail.E4M3),
                ((2 * slots * 128,), jnp.float32),
            )
        ]
        options = {"tiles": tiles, "softcap": cap, "smooth": cap is not None, "ctas": 2}
        first = jnp.zeros(1, jnp.int32)
        tail_terms(e8, c8, terms, kept, work, first, *refs, interpret=interpret, **options)
        return [ref[...].astype(jnp.float32) for ref in refs]

    by_column, by_token, mass = map(np.asarray, chunk(e8, c8, terms, kept))
    x = np.float32(3e-4) * (np.float32(e8) @ np.float32(c8).T)
    x = x + np.asarray(column)[None, :columns] + np.asarray(row)[:, None]
    if cap is None:
        expected = np.exp2(np.minimum(x, LOG2_EPSILON)) * 1.5
    else:
        u = np.tanh(x / cap)
        slope = 1 - u * u
        p = np.exp2(np.minimum(cap * LOG2E * u - 3, LOG2_EPSILON))
        expected = p * 1.5 * slope - 0.1 * (slope - 0.5)
    expected = np.where(elsewhere[:, :columns].repeat(128, 0), 0, expected)
    t8 = by_column.reshape(per_chunk, blocks, 128, 256).transpose(1, 2, 0, 3).reshape(n, -1)
    rounded = np.asarray(tail.e4m3(jnp.asarray(expected, jnp.float32)).astype(jnp.float32))
    assert (t8 != rounded).mean() < most
    np.testing.assert_allclose(t8, rounded, rtol=0.15, atol=2.0**-8)
    assert 0.5 < np.count_nonzero(t8) / t8.size < 1
    by_token = by_token.reshape(per_chunk, blocks, 256, 128).transpose(0, 2, 1, 3).reshape(-1, n)
    np.testing.assert_array_equal(by_token, np.asarray(interleaved(jnp.asarray(t8))).T)
    if cap is None:  # then Σ T is what the tiles of 16 bits lack
        return
    mass = mass.reshape(per_chunk, blocks, 2, 128).sum((0, 2)).reshape(-1)
    np.testing.assert_allclose(mass, expected.sum(1), rtol=1e-2 if most > 1e-3 else 1e-4)
