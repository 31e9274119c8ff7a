"""A real model's activations are put together right."""

import ml_dtypes
import numpy as np
import pytest

from benchmarks import inputs
from benchmarks.inputs.cases import Case
from benchmarks.inputs.real import lift, read


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


def test_pieces_are_inputs_of_a_case(pieces):
    folder, hidden, head, labels = pieces
    same = inputs.named(str(folder), Case("same", 5, 64, 25), "bfloat16")
    np.testing.assert_array_equal(same.hidden, hidden[:5])
    hidden, head = hidden.astype(np.float32), head.astype(np.float32)
    wide = inputs.named(str(folder), Case("wide", 5, 128, 25), "bfloat16")
    logits = hidden[:5] @ head.T
    got = wide.hidden.astype(np.float32) @ wide.head.astype(np.float32).T
    assert np.linalg.norm(got - logits) < 0.02 * np.linalg.norm(logits)
    np.testing.assert_array_equal(wide.labels, labels[:5])
    with pytest.raises(ValueError, match="not of"):
        inputs.named(str(folder), Case("more classes", 5, 64, 26), "bfloat16")
