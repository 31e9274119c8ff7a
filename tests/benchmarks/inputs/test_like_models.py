"""Drawn activations have the column statistics of real models."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.inputs import like_models
from benchmarks.inputs.arrays import Arrays
from benchmarks.inputs.columns import column_statistics
from benchmarks.inputs.like_models import PRESETS, Statistics, generate

EPS = 2.0**-12
# Measured on Alpaca text at ε = 2^-12 with blocks of 128 tokens: Gemma 3 270M with V cut to
# 256,000, SmolLM2-135M-Instruct with its whole V.
REAL = {
    "gemma": (
        256_000,
        {"elements": 0.00048, "block_columns": 0.0179, "tiles": 0.45, "sorted_tiles": 0.28},
    ),
    "smollm": (
        49_152,
        {"elements": 0.0021, "block_columns": 0.091, "tiles": 0.96, "sorted_tiles": 0.80},
    ),
}
UNION = {"gemma": {1024: 0.062, 2048: 0.087}, "smollm": {1024: 0.27, 2048: 0.38}}
NOTHING = Statistics(
    popularity=0, patches=0, context=0, topic=0, context_spread=0, anchor=0, anchor_spread=0
)


def mismatches(name: str, n: int, data: Arrays) -> list[str]:
    """Statistics that lie more than a quarter from the real model's."""
    found = column_statistics(data.hidden, data.head, eps=EPS)
    pairs = [(key, getattr(found, key), real) for key, real in REAL[name][1].items()]
    pairs += [(f"union {m}", found.union[m], UNION[name][m]) for m in UNION[name] if m <= n]
    return [
        f"{key} {got:.5f}, not {real}" for key, got, real in pairs if abs(got / real - 1) > 0.25
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("name", "n"), [("smollm", 2048), ("gemma", 2048)])
def test_the_statistics_match_the_real_model(name, n):
    assert mismatches(name, n, generate(name, n, 320, REAL[name][0])) == []


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_statistics_match_at_a_small_size():
    assert mismatches("smollm", 512, generate("smollm", 512, 257, 49_152, seed=3)) == []


def test_flat_logits_do_not_match():
    data = generate(NOTHING, 256, 8, 8192)
    assert len(mismatches("smollm", 256, data)) == 4


@pytest.mark.parametrize("shape", [(1, 2, 2), (33, 24, 201)])
def test_any_shape_in_any_dtype(shape):
    n, d, v = shape
    hidden, head, labels = generate("gemma", n, d, v, dtype=jnp.float32)
    assert (hidden.shape, head.shape, labels.shape) == ((n, d), (v, d), (n,))
    assert hidden.dtype == head.dtype == jnp.float32
    assert labels.dtype == jnp.int32
    assert bool(jnp.isfinite(hidden).all() & jnp.isfinite(head).all())
    assert bool(jnp.all((labels >= 0) & (labels < v)))


def test_a_seed_repeats_and_another_differs():
    first, again, other = (
        generate("gemma", 33, 24, 201, seed=seed, dtype=jnp.float32) for seed in (0, 0, 1)
    )
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(np.asarray(a) != np.asarray(c))


@pytest.mark.slow
def test_the_hidden_size_changes_no_logit_beyond_rounding():
    small, large = (generate("gemma", 40, d, 500, dtype=jnp.float32) for d in (257, 400))
    z = [
        np.asarray(x.hidden, np.float64) @ np.asarray(x.head, np.float64).T for x in (small, large)
    ]
    assert z[0].std() > 2
    np.testing.assert_allclose(z[0], z[1], atol=1e-3)


def test_labels_follow_the_softmax():
    hidden, head, labels = generate("smollm", 4000, 64, 1000)
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= z.max(1, keepdims=True)
    p = np.exp(log_p)
    np.testing.assert_allclose(p.sum(1), 1)
    entropy = -(p * log_p).sum(1)
    loss = -log_p[np.arange(4000), np.asarray(labels)]
    spread = np.sqrt(((p * log_p**2).sum(1) - entropy**2).sum()) / 4000
    assert entropy.mean() > 0.1
    assert abs(loss.mean() - entropy.mean()) < 5 * spread


def test_no_class_is_drawn_twice_as_often_where_chunks_overlap(monkeypatch):
    monkeypatch.setattr(like_models, "CHUNK", 64)
    n, v = 8_000, 100  # each class 80 times, so 160 would be 9 standard deviations off
    counts = np.bincount(np.asarray(generate(NOTHING, n, 8, v).labels), minlength=v)
    assert np.all(np.abs(counts - n / v) < 5 * np.sqrt(n / v))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'llama'; must be one of gemma, smollm"):
        generate("llama", 8, 8, 8)
    with pytest.raises(ValueError, match="d=1"):
        generate("gemma", 8, 1, 8)
    with pytest.raises(ValueError, match=r"topic=1\.5"):
        dataclasses.replace(PRESETS["gemma"], topic=1.5)
    with pytest.raises(ValueError, match="topic_length=0"):
        dataclasses.replace(PRESETS["gemma"], topic_length=0)


def test_the_paper_shapes_trace_without_an_array_of_n_times_v():
    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    n, v = 32_768, 262_144
    traced = jax.make_jaxpr(lambda: generate("gemma", n, 4096, v))()
    assert max(sizes(traced.jaxpr)) <= v * 4096
