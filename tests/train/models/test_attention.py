"""Who attends on which device, and that cuDNN is told what the mask would say."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models import attention
from train.models.attention import choose
from train.models.config import PRESETS

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SMOL, GEMMA = (
    dataclasses.replace(PRESETS[name], dtype="bfloat16", attention="cudnn")
    for name in ("smollm2-135m", "gemma3-270m")
)
FLASH = dataclasses.replace(SMOL, attention="auto")
HERE = {"length": 1024, "segments": 8, "cached": False, "capability": "9.0"}


@pytest.mark.parametrize(
    ("config", "changes", "way", "reason"),
    [
        (SMOL, {}, "packed", "up to 8 segments"),
        (GEMMA, {}, "packed", "up to 8 segments"),
        (SMOL, {"segments": 1}, "causal", "one segment"),
        (SMOL, {"segments": None}, "masked", "nobody says"),
        (SMOL, {"segments": 40}, "masked", "40 segments"),
        (SMOL, {"segments": None, "length": 1023}, "xla", "must be even"),
        (SMOL, {"length": 1023}, "packed", "up to 8 segments"),
        (SMOL, {"capability": "8.6"}, "masked", "Hopper"),
        (SMOL, {"capability": "10.0"}, "packed", "up to 8 segments"),
        (SMOL, {"capability": "7.5"}, "xla", "CUDA"),
        (SMOL, {"capability": None}, "xla", "CUDA"),
        (SMOL, {"cached": True}, "xla", "cache"),
        (GEMMA, {"capability": "8.0"}, "xla", "up to 128"),
        (dataclasses.replace(SMOL, dtype="float32"), {}, "xla", "float32"),
        (dataclasses.replace(SMOL, attention_softcap=50.0), {}, "xla", "softcap"),
        (dataclasses.replace(SMOL, head_size=60), {}, "xla", "config.head_size=60"),
        (dataclasses.replace(SMOL, attention="xla"), {}, "xla", "asked"),
        (FLASH, {}, "flash", "skipped"),
        (FLASH, {"segments": 40}, "flash", "skipped"),
        (dataclasses.replace(FLASH, attention_softcap=50.0), {}, "flash", "skipped"),
        (FLASH, {"segments": None}, "masked", "nobody says"),
        (FLASH, {"capability": "10.0"}, "packed", "up to 8 segments"),
        (FLASH, {"cached": True}, "xla", "cache"),
        (dataclasses.replace(FLASH, head_size=80), {}, "packed", "up to 8 segments"),
        (dataclasses.replace(FLASH, dtype="float16"), {}, "packed", "up to 8 segments"),
    ],
)
def test_the_fastest_that_can_attends(config, changes, way, reason):
    found, why = choose(config, **HERE | changes)
    assert found == way
    assert reason in why


def test_without_the_packed_layout_a_mask_serves(monkeypatch):
    monkeypatch.setattr(attention, "cudnn", None)
    assert choose(SMOL, **HERE)[0] == "masked"


def test_no_cuda_device_has_no_capability():
    assert jax.default_backend() != "cpu" or attention.capability() is None


@pytest.mark.parametrize("window", [None, 3])
def test_the_packed_layout_says_what_the_mask_says(monkeypatch, window):
    """`cudnn` is played by a function that goes by cuDNN's documentation of lengths and offsets."""

    def dot_product_attention(
        query, key, value, *, q_seqlen, q_offsets, scale, sliding_window_length, **same
    ):
        assert same["mask_type"] == "padding causal"
        assert same["kv_seqlen"] is q_seqlen
        assert same["kv_offsets"] is q_offsets
        assert q_offsets.shape == (q_seqlen.shape[0], q_seqlen.shape[1] + 1)
        q_seqlen, q_offsets = np.asarray(q_seqlen), np.asarray(q_offsets)
        at = np.arange(query.shape[1])
        seen = np.zeros((len(query), len(at), len(at)), bool)
        for row in range(len(query)):
            for size, first in zip(q_seqlen[row], q_offsets[row, :-1], strict=True):
                assert (size == -1) == (first == -1)
                inside = (at >= first) & (at < first + size)
                distance = at[:, None] - at
                near = (distance >= 0) & (distance < (sliding_window_length or len(at)))
                seen[row] |= np.outer(inside, inside) & near
        assert seen.any(axis=-1).all()  # so that no output is undefined
        return jax.nn.dot_product_attention(query, key, value, mask=seen[:, None], scale=scale)

    fake = SimpleNamespace(
        dot_product_attention=dot_product_attention,
        MaskType=SimpleNamespace(PADDING_CAUSAL="padding causal"),
    )
    monkeypatch.setattr(attention, "cudnn", fake)
    random = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] + [3] * 6, [1] * 9 + [0] * 3])
    starts = jnp.array([[0, 5, 6, 12], [0, 12, 12, 12]])
    query, key, value = (
        jnp.asarray(random.normal(size=(2, 12, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )
    mask = attention.attention_mask(jnp.asarray(segments), window)
    packed, masked = (
        attention.attend(
            query, key, value, attention.View((query, query), way, mask, starts, window), scale=0.3
        )
        for way in ("packed", "xla")
    )
    assert np.abs(masked).max() > 0.5
    real = segments > 0
    np.testing.assert_allclose(packed[real], masked[real], rtol=1e-5, atol=1e-5)
    assert np.isfinite(packed).all()


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_one_segment_are_told_what_the_mask_says(monkeypatch, window):
    plain = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    random = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(random.normal(size=(2, 12, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )
    mask = attention.attention_mask(jnp.ones((2, 12), jnp.int32), window)
    causal, masked = (
        attention.attend(
            query, key, value, attention.View((query, query), way, mask, window=window), scale=0.3
        )
        for way in ("causal", "xla")
    )
    assert np.abs(masked).max() > 0.5
    np.testing.assert_allclose(causal, masked, rtol=1e-5, atol=1e-5)
