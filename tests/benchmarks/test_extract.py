"""Activations of real models: what needs no model."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from benchmarks import extract
from benchmarks.inputs import real


def test_what_is_written_is_what_is_read(tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((10, 64), np.float32)
    labels = rng.integers(0, 25, 10)
    quants = rng.integers(-127, 128, (25, 64), np.int8)
    scales = rng.uniform(0.01, 0.02, (25, 2)).astype(np.float16)
    extract.write(tmp_path, hidden, labels, quants, scales, piece=2 * 64)
    assert len(list(tmp_path.glob("head_q*.npy"))) == 13
    got = real.read(tmp_path)
    np.testing.assert_array_equal(got.hidden, hidden.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(got.labels, labels)
    head = quants * np.repeat(scales.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(got.head, head.astype(ml_dtypes.bfloat16))
    z = hidden @ head.T
    exact = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(10), labels])
    assert extract.nats(hidden, labels, quants, scales) == pytest.approx(exact, rel=1e-4)


def test_blocks_of_q8_0():
    rng = np.random.default_rng(0)
    quants = rng.integers(-127, 128, (5, 2, 32), np.int8)
    scales = rng.uniform(0.01, 0.02, (5, 2)).astype(np.float16)
    data = np.concatenate([scales[..., None].view(np.uint8), quants.view(np.uint8)], axis=2)
    got = extract.unpacked(data.reshape(5, -1))
    np.testing.assert_array_equal(got[0], quants.reshape(5, -1))
    np.testing.assert_array_equal(got[1], scales)


def test_sequences_begin_with_a_text():
    texts = [[1] * 3, [2] * 4, [3] * 2, [4] * 9, [5]]
    assert list(extract.packed(texts, 5)) == [[1, 1, 1, 2, 2], [3, 3, 4, 4, 4]]


def test_records_without_an_answer_are_left_out_and_broken_ones_named(tmp_path: pathlib.Path):
    path = tmp_path / "texts.jsonl"
    good = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"output": " "}) + "\n")
    assert list(extract.records(path)) == [good]
    assert extract.alpaca(good) == (
        "<bos>### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3<eos>"
    )
    assert extract.chatml(good | {"input": ""}) == (
        "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    path.write_text(json.dumps(good) + "\n{}\n")
    with pytest.raises(ValueError, match="line 2"):
        list(extract.records(path))


def test_mistakes_on_the_command_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert extract.main([str(tmp_path / "no.gguf"), "texts.jsonl", str(tmp_path)]) == 2
    assert "benchmarks.extract: " in capsys.readouterr().err
