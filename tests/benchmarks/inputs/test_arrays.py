"""Arrays fit each other, and files give back what was written."""

import pathlib

import numpy as np
import pytest

from benchmarks.inputs import arrays, random
from benchmarks.inputs.cases import Case

SMALL = Case("small", 33, 24, 201)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_gives_back_the_same_bits(tmp_path: pathlib.Path, dtype: str):
    data = random.make("peaked", SMALL, dtype)
    arrays.save(data, tmp_path / "x.npz")
    loaded = arrays.load(tmp_path / "x.npz")
    assert loaded.kind == "peaked"
    for name in ("hidden", "head", "labels"):
        before, after = getattr(data, name), getattr(loaded, name)
        assert before.dtype == after.dtype
        assert before.tobytes() == after.tobytes()


def test_wrong_arrays_are_refused_with_what_would_be_right(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="'int8'; must be one of bfloat16, float32"):
        random.make("flat", SMALL, "int8")
    np.savez(tmp_path / "x.npz", hidden=np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="no array named head, labels"):
        arrays.load(tmp_path / "x.npz")
    zeros = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
        arrays.Inputs("x", zeros, zeros, np.array([0, 1, 3], np.int32))
    with pytest.raises(ValueError, match="do not fit"):
        arrays.Inputs("x", zeros, zeros[:, :2], np.array([0, 1, 2], np.int32))
