"""Steps to measure: how they are read, their rows, and the operations that they count."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.steps import variant
from benchmarks.steps.variant import SHAPES, Variant, batch_of, flops_per_token, read, shape_of


def test_a_variant_is_read_and_says_what_it_changes():
    assert read("") == Variant()
    found = read("torch,rows=32,loss=full,beta=0,compiled=false")
    assert found == Variant("torch", rows=32, loss="full", beta=0.0, compiled=False)
    assert str(found) == "torch rows=32 loss=full beta=0.0 compiled=False"
    assert read("mesh=data=2+fsdp=3").devices == (2, 3)
    assert read("").devices == (1, 1)
    assert shape_of("smollm2-135m", read("layers=2,remat=full")).remat == "full"
    assert len(shape_of("gemma3-270m", read("layers=7")).kinds) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=0", "above 0"),
        ("rows=x", "above 0"),
        ("segments=two", "packed, masked, one"),
        ("numpy", "jax, torch"),
        ("row=1", "no 'row'"),
        ("compiled=1", "True, False"),
        ("mesh=tensor=2", "--mesh tensor=2: must be like"),
        ("torch,mesh=data=2", "mesh makes no difference to torch"),
        ("accumulate=2,torch", "accumulate makes no difference to torch"),
        ("compiled=false", "compiled makes no difference to jax"),
        ("filter=some", "--gradient-filter must be one of fp8, auto"),
        ("loss=naive,filter=auto", "filter makes no difference to loss=naive"),
    ],
)
def test_what_is_no_variant_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_rows_are_packed_and_say_where_segments_start():
    shape = SHAPES["nano"]
    batch = batch_of(shape, Variant(rows=3, accumulate=2), 1024)
    assert batch["tokens"].shape == (6, 1024)
    assert batch["tokens"].max() < shape.vocab_size
    assert batch["segments"].max() > 8
    starts = batch["starts"]
    assert ((starts < 1024).sum(axis=1) == batch["segments"].max(axis=1)).all()
    assert batch_of(shape, Variant(segments="one"), 64)["starts"].tolist() == [[0]] * 16
    assert "starts" not in batch_of(shape, Variant(segments="masked"), 64)


def test_operations_are_those_of_weights_and_of_keys_that_are_seen():
    shape = dataclasses.replace(SHAPES["nano"], layers=2, sliding=(True, False), window=2)
    products = 2 * 64 * (2 * 64 + 2 * 32 + 3 * 192) + 8192 * 64
    keys = (1 + 2 + 2 + 2) / 4 + (1 + 2 + 3 + 4) / 4
    whole = flops_per_token(shape, np.ones((3, 4), np.int32))
    assert whole == pytest.approx(6 * products + 12 * 64 * keys)
    cut = flops_per_token(shape, np.array([[1, 1, 2, 2]]))
    assert cut == pytest.approx(6 * products + 12 * 64 * (1.5 + 1.5))


def test_the_published_shapes_have_their_published_sizes():
    for name, billions in (("llama3.2-1b", 1.236), ("gemma2-2b", 2.614)):
        shape = variant.SHAPES[name]
        inner, shared = (n * shape.head_size for n in (shape.heads, shape.kv_heads))
        block = shape.hidden_size * (2 * inner + 2 * shared + 3 * shape.mlp_size)
        total = shape.layers * block + shape.vocab_size * shape.hidden_size
        assert total / 1e9 == pytest.approx(billions, abs=2e-3)
