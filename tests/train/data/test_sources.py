from fractions import Fraction
from pathlib import Path

import pytest

from train.data.sources import Source, sources


@pytest.mark.parametrize(
    ("written", "path", "weight"),
    [
        ("a.jsonl", "a.jsonl", None),
        ("a.jsonl:2", "a.jsonl", 2),
        ("dir/a.jsonl:0.25", "dir/a.jsonl", Fraction(1, 4)),
        ("a.jsonl:.5", "a.jsonl", Fraction(1, 2)),
        ("C:a.jsonl", "C:a.jsonl", None),
        ("a.jsonl:-1", "a.jsonl:-1", None),  # of which there is no file, as is then said
        ("a:1:3", "a:1", 3),
    ],
)
def test_a_weight_is_written_behind_a_colon(written, path, weight):
    assert Source.of(written) == Source.of(Path(written)) == Source(Path(path), weight)


def test_a_file_with_such_a_name_is_meant_itself(tmp_path):
    path = tmp_path / "a.jsonl:2"
    path.touch()
    assert Source.of(path) == Source(path)


def test_weights_are_for_all_files_or_for_none():
    assert [s.weight for s in sources(["a", "b"])] == [None, None]
    assert [s.weight for s in sources(["a:3", "b:1"])] == [3, 1]
    with pytest.raises(ValueError, match="b has no weight and other files have"):
        sources(["a:3", "b", "c"])
    with pytest.raises(ValueError, match="--data names b twice: a weight"):
        sources(["a:1", "b:3", "./b:2"])
    with pytest.raises(ValueError, match="--data a:0: a weight must be more than 0"):
        sources(["a:0"])
