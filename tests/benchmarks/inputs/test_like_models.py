"""Synthetic activations have the column statistics of real models, and real ones are read right."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import activations, cases, inputs
from benchmarks.activations import PRESETS, Statistics, column_statistics, generate, lift, read

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


def mismatches(name: str, n: int, data: activations.Activations) -> list[str]:
    """Statistics that lie more than a quarter from the real model's."""
    found = column_statistics(data.hidden, data.head, eps=EPS)
    pairs = [(key, getattr(found, key), real) for key, real in REAL[name][1].items()]
    pairs += [(f"union {m}", found.union[m], UNION[name][m]) for m in UNION[name] if m <= n]
    return [
        f"{key} {got:.5f}, not {real}" for key, got, real in pairs if abs(got / real - 1) > 0.25
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("smollm", 1024), ("smollm", 2048), ("gemma", 2048)])
def test_the_statistics_match_the_real_model(name, n):
    assert mismatches(name, n, generate(name, n, 320, REAL[name][0])) == []


def test_the_statistics_match_at_a_small_size():
    assert mismatches("smollm", 1024, generate("smollm", 1024, 257, 49_152, seed=3)) == []


def test_flat_logits_do_not_match():
    data = generate(NOTHING, 256, 8, 49_152)
    assert len(mismatches("smollm", 256, data)) == 4


def test_column_statistics_against_every_probability():
    data = generate("smollm", 4000, 64, 1000)
    data = data._replace(hidden=data.hidden[:300])
    z = np.asarray(data.hidden[:256], np.float64) @ np.asarray(data.head, np.float64).T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    above = p > EPS
    columns = above.reshape(2, 128, 1000).any(1)
    by_mean = columns[:, np.argsort(-np.asarray(data.head, np.float64) @ data.hidden.mean(0))]
    found = column_statistics(data.hidden, data.head, eps=EPS)
    assert 0 < found.sorted_tiles <= 1
    assert found.union == {}
    np.testing.assert_allclose(found.elements, above.mean(), rtol=1e-2)
    np.testing.assert_allclose(found.block_columns, columns.mean(), rtol=1e-2)
    for tiles, marks in ((found.tiles, columns), (found.sorted_tiles, by_mean)):
        # Rounding may move an element across ε, and so at most a tile or two of 14.
        assert abs(tiles - marks[:, :896].reshape(2, 7, 128).any(2).mean()) <= 2 / 14


def test_column_statistics_need_a_whole_tile():
    with pytest.raises(ValueError, match="N=127 and V=200"):
        column_statistics(jnp.ones((127, 8)), jnp.ones((200, 8)))


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
    monkeypatch.setattr(activations, "CHUNK", 64)
    n, v = 20_000, 100
    counts = np.bincount(np.asarray(generate(NOTHING, n, 8, v).labels), minlength=v)
    assert np.all(np.abs(counts - n / v) < 5 * np.sqrt(n / v))


def test_lift_keeps_every_logit():
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal((m, 30), np.float32) for m in (20, 100))
    lifted = lift(hidden, 80), lift(head, 80)
    assert [x.shape for x in lifted] == [(20, 80), (100, 80)]
    np.testing.assert_allclose(lifted[0] @ lifted[1].T, hidden @ head.T, rtol=1e-4, atol=1e-4)
    assert lift(hidden.astype(ml_dtypes.bfloat16), 80).dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="d=29 must be at least D=30"):
        lift(hidden, 29)


@pytest.fixture
def pieces(tmp_path):
    """A folder of pieces of N, D, V = 10, 64, 25 and the float32 arrays it stands for."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((10, 64), np.float32).astype(ml_dtypes.bfloat16)
    q = rng.integers(-127, 128, (25, 64), np.int8)
    scales = rng.uniform(0.01, 0.02, (25, 2)).astype(np.float16)
    labels = np.array([3, 24, 0, 19, 20, 7, 8, 9, 21, 2], np.int32)
    np.save(tmp_path / "hidden.npy", hidden.view(np.uint16))
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "head_scales.npy", scales)
    for i in range(13):  # more than ten: their order is of numbers, not of letters
        np.save(tmp_path / f"head_q{i}.npy", q[2 * i : 2 * i + 2])
    head = q.astype(np.float32) * np.repeat(scales.astype(np.float32), 32, axis=1)
    return tmp_path, hidden, head.astype(ml_dtypes.bfloat16), labels


def test_pieces_are_put_together(pieces):
    folder, hidden, head, labels = pieces
    data = read(folder)
    for got, expected in zip(data, (hidden, head, labels), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)


def test_a_cut_vocabulary_leaves_out_tokens_with_labels_beyond_it(pieces):
    folder, hidden, head, labels = pieces
    data = read(folder, n=6, v=20)
    inside = np.flatnonzero(labels < 20)[:6]
    np.testing.assert_array_equal(np.asarray(data.hidden), hidden[inside])
    np.testing.assert_array_equal(np.asarray(data.head), head[:20])
    np.testing.assert_array_equal(np.asarray(data.labels), labels[inside])
    with pytest.raises(ValueError, match="7 tokens with labels < 20, not n=8"):
        read(folder, n=8, v=20)


def test_a_missing_piece_is_named(pieces):
    folder = pieces[0]
    (folder / "head_q12.npy").unlink()
    with pytest.raises(ValueError, match="24 of 25 head rows"):
        read(folder)
    np.save(folder / "head_q12.npy", np.zeros((1, 32), np.int8))
    with pytest.raises(ValueError, match=r"head_q12.npy \(1, 32\) does not fit"):
        read(folder)


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


def test_pieces_are_inputs_of_a_case(pieces):
    folder, hidden, head, labels = pieces
    same = inputs.of(str(folder), cases.Case("same", 5, 64, 25), "bfloat16")
    np.testing.assert_array_equal(same.hidden, hidden[:5])
    hidden, head = hidden.astype(np.float32), head.astype(np.float32)
    wide = inputs.of(str(folder), cases.Case("wide", 5, 128, 25), "bfloat16")
    logits = hidden[:5] @ head.T
    got = wide.hidden.astype(np.float32) @ wide.head.astype(np.float32).T
    assert np.linalg.norm(got - logits) < 0.02 * np.linalg.norm(logits)
    np.testing.assert_array_equal(wide.labels, labels[:5])
    with pytest.raises(ValueError, match="not of"):
        inputs.of(str(folder), cases.Case("more classes", 5, 64, 26), "bfloat16")
