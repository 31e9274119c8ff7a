"""A program's extra memory."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.measure import memory


def test_extra_memory_counts_outputs_and_temporaries_but_no_arguments():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: (x @ x) @ x).lower(x).compile()
    extra = memory.extra_memory(compiled)
    assert extra.output == x.nbytes
    assert extra.temporary >= x.nbytes  # the first product
    assert extra.mb == pytest.approx((extra.output + extra.temporary) / 2**20)


def test_extra_memory_leaves_out_what_is_written_into_donated_arguments():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert memory.extra_memory(compiled).output == 0
