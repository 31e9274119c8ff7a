"""The errors of a filter worked out on a CPU: against NumPy on the tiles that the plan names."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import filter_error
from benchmarks.inputs import like_models
from benchmarks.inputs.arrays import Arrays
from lsce.sparse import columns
from lsce.sparse import filter as filtering

N, D, V = 256, 16, 500


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    drawn = like_models.generate("smollm", N, D, V)
    return Arrays(*map(np.asarray, drawn))


def softmax(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    z = hidden @ head.T
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.slow
def test_errors_are_those_of_leaving_the_inactive_tiles_out(
    arrays: Arrays, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def order_columns(*given):
        seen.append(ordered_columns(*given))
        return seen[-1]

    ordered_columns = columns.order_columns
    monkeypatch.setattr(columns, "order_columns", order_columns)
    row = filter_error.measure("drawn", arrays, 0.05, "abc", tile_c=128)

    head = arrays.head.astype(np.float64)
    ordered, labels, bound = filter_error.ordered(
        jnp.asarray(arrays.hidden, jnp.float32),
        jnp.asarray(arrays.head, jnp.float32),
        arrays.labels,
    )
    hidden = np.asarray(ordered, np.float64)
    p = softmax(hidden, head)
    assert (np.asarray(bound) < np.log(np.exp(hidden @ head.T).sum(1)) + 1e-4).all()
    found, active = seen[0]
    tile = np.asarray(found.position) // 128
    kept = np.asarray(active)[tile][:, np.arange(N) // 128].T
    lost = np.where(kept, 0.0, p)
    assert 0 < lost.sum() < 0.5 * N
    wrong = p - lost
    target = np.eye(V)[np.asarray(labels)] * 0.9 + 0.1 / V
    back = lost.sum(1, keepdims=True) * head.mean(0)
    error = (wrong - target) @ head + back - (p - target) @ head
    exact = np.linalg.norm((p - target) @ head)
    assert row.hidden_error == pytest.approx(np.linalg.norm(error) / exact, rel=1e-3)
    error, exact = lost.T @ hidden, (p - target).T @ hidden
    assert row.head_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(exact), rel=1e-3)
    assert row.dropped == pytest.approx(lost.sum() / N, rel=1e-3)
    rows = ~kept.any(0)
    assert 0 < row.rows_left_out == rows.mean() < 1
    whole = (p - target).T @ hidden
    norm = np.linalg.norm(whole[rows])
    assert row.rows_norm == pytest.approx(norm / np.linalg.norm(whole), rel=1e-3)
    assert row.rows_error == pytest.approx(np.linalg.norm(error[rows]) / norm, rel=1e-3)
    assert row.pairs == pytest.approx(np.asarray(active).mean())
    assert (row.n, row.d, row.v, row.epsilon) == (N, D, V, pytest.approx(0.05))


@pytest.mark.slow
def test_the_tail_in_8_bits_leaves_little_of_the_error(arrays: Arrays):
    plain = filter_error.measure("drawn", arrays, 0.05, "abc")
    tail = filter_error.measure("drawn", arrays, 0.05, "abc", tail=True)
    assert (plain.tail, tail.tail) == (False, True)
    assert tail.pairs == plain.pairs
    assert tail.dropped == plain.dropped > 0
    for name in ("hidden_error", "head_error", "rows_error"):
        assert 0 < getattr(tail, name) < 0.3 * getattr(plain, name), name


@pytest.mark.slow
def test_the_tail_needs_no_block_kept_whole(arrays: Arrays):
    flat = Arrays(arrays.hidden * 0.05, arrays.head, arrays.labels)
    plain = filter_error.measure("drawn", flat, 0.05, "abc")
    tail = filter_error.measure("drawn", flat, 0.05, "abc", tail=True)
    assert plain.whole_blocks == N // 128
    assert tail.whole_blocks == 0
    assert tail.pairs < 1
    assert tail.dropped > 0.1
    assert tail.hidden_error < 0.003
    assert tail.head_error < 0.003


@pytest.mark.slow
def test_no_filter_to_speak_of_makes_no_error(arrays: Arrays):
    row = filter_error.measure("drawn", arrays, 1e-30, "abc")
    assert row.hidden_error < 1e-6
    assert row.head_error < 1e-6
    assert row.pairs == 1
    assert (row.rows_left_out, row.rows_error) == (0, None)


def test_a_flat_distribution_is_kept_whole(arrays: Arrays):
    flat = arrays._replace(hidden=arrays.hidden * np.asarray(1e-3, arrays.hidden.dtype))
    row = filter_error.measure("flat", flat, 0.05, "abc")
    assert row.whole_blocks == N // 128
    assert row.hidden_error < 1e-6


def test_the_default_filter_is_the_backends(arrays: Arrays):
    row = filter_error.measure("drawn", arrays, "auto", "abc")
    expected = jnp.exp(filtering.log_epsilon("auto", jnp.int32(N), V))
    assert row.epsilon == pytest.approx(float(expected))


@pytest.mark.slow
def test_the_default_filter_leaves_less_of_an_error_than_the_one_before(monkeypatch):
    """As of many classes. In float32; bfloat16's rounding adds .0024 on a GPU."""
    monkeypatch.setattr(filtering, "FEW_CLASSES", 1)
    drawn = Arrays(*map(np.asarray, like_models.generate("smollm", 512, 64, 8192)))
    default = filter_error.measure("drawn", drawn, "auto", "abc")
    larger = filter_error.measure("drawn", drawn, 16 * default.epsilon, "abc")
    assert default.whole_blocks == larger.whole_blocks == 0
    assert larger.pairs < default.pairs < 0.5
    assert default.hidden_error < 0.002 < 0.008 < larger.hidden_error < 0.014
    assert default.head_error < 0.001 < 0.004 < larger.head_error


def test_a_filter_that_is_no_probability_is_refused(arrays: Arrays):
    with pytest.raises(ValueError, match="ε = 32 must be above 0 and below 1"):
        filter_error.measure("drawn", arrays, 32.0)


def test_arrays_of_one_s_own_come_in_one_file(
    arrays: Arrays, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "mine.npz"
    hidden, head = (np.asarray(x, np.float32) for x in arrays[:2])
    np.savez(path, hidden=hidden, head=head, labels=arrays.labels)
    rows = tmp_path / "new" / "rows.json"
    command = [str(path), "--n", str(N), "--power", "-5", "--commit", "abc", "--json", str(rows)]
    assert filter_error.main(command) == 0
    (row,) = json.loads(rows.read_text())
    expected = filter_error.measure("mine.npz", arrays, 2.0**-5, "abc")
    assert row == {**expected._asdict(), "time": row["time"]}
    assert capsys.readouterr().out.startswith("mine.npz: N, V = 256, 500: ε = 2^-5.00")


@pytest.mark.parametrize("n", [0, 100])
def test_tokens_that_make_no_blocks_are_refused(
    n: int,
    arrays: Arrays,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
):
    cut = arrays._replace(hidden=arrays.hidden[:n], labels=arrays.labels[:n])
    with pytest.raises(ValueError, match=f"{n} tokens"):
        filter_error.measure("drawn", cut, "auto")
    assert filter_error.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
