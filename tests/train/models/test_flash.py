"""Attention within segments: in Mosaic GPU's interpreter, and lowered for CUDA."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import on_devices
import pytest
from attending import assert_close, numbered, ours, packed, theirs
from flax import nnx

from train.models import attention, flash
from train.models.config import PRESETS
from train.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 7])
def test_bounds_say_what_the_mask_says(window):
    starts = jnp.array([[0, 5, 6, 12], [0, 9, 20, 20]])
    mask = attention.attention_mask(numbered(starts, 20), window)[:, 0]
    seen = flash.bounds(starts, 20, window)
    down, across = np.arange(20)[None, :, None], np.arange(20)[None, None]
    np.testing.assert_array_equal((seen.first[:, :, None] <= across) & (across <= down), mask)
    # A key is seen by the queries from itself on, up to its end.
    np.testing.assert_array_equal((seen.end[:, None, :] > down) & (across <= down), mask)


@pytest.mark.slow
def test_segments_attend_to_themselves_and_other_tiles_are_not_touched():
    """What is not a number there would be none here: 0 · NaN is NaN."""
    arrays, starts, segments = packed([[0, 64, 70, 128]], 140, (2, 1), 64)
    wanted = theirs(arrays, segments, None, 0.1, None)
    arrays = [x.at[:, :64].set(jnp.nan).at[:, 128:].set(jnp.nan) for x in arrays]
    found = ours(arrays, starts, None, scale=0.1, interpret=plgpu.InterpretGPUParams())
    assert np.isnan(found[0][:, :64]).all()
    assert_close([x[:, 64:128] for x in found], [x[:, 64:128] for x in wanted])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "size", "length", "window", "races"),
    [((2, 2), 64, 192, 70, True), ((2, 1), 256, 128, 30, False)],
)
def test_windows_and_softcaps(heads, size, length, window, races):
    arrays, starts, segments = packed([[0, 5, 66, length]], length, heads, size)
    interpret = plgpu.InterpretGPUParams(detect_races=races)
    found = ours(arrays, starts, window, scale=0.1, softcap=5.0, interpret=interpret)
    assert_close(found, theirs(arrays, segments, window, 0.1, 5.0))


@pytest.mark.parametrize(
    ("heads", "size", "window", "softcap"),
    [((9, 3), 64, None, None), ((8, 4), 256, 4096, 50.0)],
)
def test_lowers_for_cuda_without_a_gpu(heads, size, window, softcap):
    def run(starts: Any, *arrays: Any) -> Any:
        return ours(arrays, starts, window, scale=0.1, softcap=softcap)

    arrays = (
        jax.ShapeDtypeStruct((2, 1024, n, size), jnp.bfloat16)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    traced = jax.jit(run).trace(jax.ShapeDtypeStruct((2, 16), jnp.int32), *arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = 4 if size > 128 else 3
    assert text.count("custom_call @mosaic_gpu") == kernels


ON_TWO = """
    import dataclasses
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from train import mesh
    from train.models import attention, flash
    from train.run.options import MeshShape

    def per_device(query, key, value, seen, *, scale, softcap):
        assert query.shape[0] == seen.first.shape[0] == 2  # of four rows
        return query + seen.first[:, :, None, None].astype(query.dtype)

    flash.attention = per_device
    on = mesh.make(MeshShape(data=2))
    query = jax.device_put(
        np.arange(32.0).reshape(4, 4, 1, 2), NamedSharding(on, PartitionSpec(mesh.ROWS))
    )
    starts = np.array([[0, 1], [0, 2], [0, 3], [0, 4]])

    @jax.jit
    def attend(query):
        seen = flash.bounds(jnp.asarray(starts), 4, None)
        view = attention.View((query, query), "flash", None, seen=seen)
        return attention.attend(query, query, query, view, scale=1.0)

    first = np.where(np.arange(4) >= starts[:, 1:], starts[:, 1:], 0)
    np.testing.assert_array_equal(attend(query), query + first[:, :, None, None])
    print("each its rows")
"""


@pytest.mark.slow
def test_each_device_attends_for_its_rows():
    assert on_devices.run(2, ON_TWO) == "each its rows"


@pytest.mark.slow
def test_a_decoder_has_its_segments_and_windows_seen_so(monkeypatch):
    """Each kind of layer its own window, in a loop over layers."""
    interpret = plgpu.InterpretGPUParams()
    run = functools.partial(flash.attention, interpret=interpret)
    monkeypatch.setattr(attention.flash, "attention", run)
    monkeypatch.setattr(attention, "capability", lambda: "9.0")
    config = dataclasses.replace(
        PRESETS["nano"],
        head_size=64,
        window=20,
        sliding=(True, False),
        attention_softcap=5.0,
        dtype="bfloat16",
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8192, (1, 96)), jnp.int32)
    starts = jnp.array([[0, 40, 96]], jnp.int32)
    segments = numbered(starts, 96)
    positions = jnp.arange(96, dtype=jnp.int32)[None] - jnp.where(segments == 1, 0, 40)

    def hidden(kind: str) -> Any:
        random = np.random.default_rng(1)
        model = Decoder(dataclasses.replace(config, attention=kind), rngs=nnx.Rngs(params=0))
        # Residual branches begin as zeros, and would add nothing.
        for matrix in (model.blocks.attention.out, model.blocks.mlp.down):
            shape = matrix.kernel[...].shape
            matrix.kernel[...] = jnp.asarray(random.normal(0, 0.1, shape), jnp.float32)
        return np.asarray(model(tokens, segments, positions, starts), np.float32)

    found, wanted = hidden("auto"), hidden("xla")
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
