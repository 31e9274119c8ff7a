"""Inputs by name: a kind, a file, a folder."""

import dataclasses
import pathlib

import numpy as np
import pytest

from benchmarks import inputs
from benchmarks.inputs import arrays, cases, random
from benchmarks.inputs.cases import Case

SMALL = Case("small", 33, 24, 201)


def test_a_plain_file_is_cast_cut_and_named_after_itself(tmp_path: pathlib.Path):
    data = random.make("flat", cases.CASES["tiny"], "float32")
    path = tmp_path / "mine.npz"
    np.savez(path, hidden=data.hidden, head=data.head, labels=data.labels.astype(np.int64))
    loaded = inputs.named(str(path), cases.find("tiny", 5), "bfloat16")
    assert loaded.kind == "mine"
    assert loaded.hidden.shape == (5, 72)
    assert loaded.hidden.dtype.name == "bfloat16"
    assert loaded.labels.dtype == np.int32


def test_wrong_inputs_are_refused_with_what_would_be_right(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"'spiky'; must be one of flat, peaked, an \.npz file"):
        inputs.named("spiky", SMALL, "float32")
    arrays.save(random.make("flat", SMALL, "float32"), tmp_path / "small.npz")
    for other in (cases.CASES["tiny"], dataclasses.replace(SMALL, n=34)):
        with pytest.raises(ValueError, match=r"holds flat .*33, 24, 201\), too little or not of"):
            inputs.named(str(tmp_path / "small.npz"), other, "float32")


def test_a_file_that_is_not_numpy_s_is_named(tmp_path: pathlib.Path):
    for name in ("x.npz", "hidden.npy"):
        (tmp_path / name).write_text("no array")
        path = tmp_path / name if name.endswith("z") else tmp_path
        with pytest.raises(ValueError, match=rf"{name} is not a file of NumPy arrays"):
            inputs.named(str(path), SMALL, "float32")
