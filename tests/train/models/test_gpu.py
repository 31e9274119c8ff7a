"""Attention within segments on a real GPU."""

import functools

import jax
import numpy as np
import pytest
from attending import assert_close, ours, packed, theirs


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(
    ("heads", "size", "window", "softcap"),
    [
        ((9, 3), 64, None, None),
        ((8, 8), 128, 300, None),
        ((4, 1), 256, 512, None),
        ((8, 4), 256, None, 50.0),
    ],
    ids=["smollm2", "128", "gemma3", "gemma2"],
)
@pytest.mark.parametrize("length", [1024, 1000])
def test_flash_agrees_with_float32_and_repeats_its_bits(heads, size, window, softcap, length):
    begins = [[0, 3, 130, 640, 900], [0, length, length, length, length]]
    arrays, starts, segments = packed(begins, length, heads, size)
    run = jax.jit(functools.partial(ours, window=window, scale=size**-0.5, softcap=softcap))
    found = run(arrays, starts)
    with jax.default_matmul_precision("float32"):
        assert_close(found, theirs(arrays, segments, window, size**-0.5, softcap))
    for _ in range(10):
        for a, b in zip(found, run(arrays, starts), strict=True):
            np.testing.assert_array_equal(*(np.asarray(x).view(np.uint16) for x in (a, b)))
