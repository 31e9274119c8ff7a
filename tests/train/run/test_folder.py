"""The folder of a run: what it says of itself, and that a kill leaves one that can be claimed."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from train.config import TrainConfig
from train.run import folder


def test_the_run_knows_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"data": (Path("a.jsonl:2"), Path("b.jsonl:1")), "eval_data": (Path("c.jsonl"),)}
    out = folder.claim(TrainConfig.of(out=Path("run"), **files))
    monkeypatch.chdir("/")
    found = folder.load(tmp_path / out)
    assert found.data.files == tuple(tmp_path / f"{name}.jsonl" for name in "abc")
    assert found.data.data == tuple(tmp_path / name for name in ("a.jsonl:2", "b.jsonl:1"))


def test_a_run_of_before_there_was_a_filter_to_name_had_auto(tmp_path):
    out = folder.claim(TrainConfig.of(out=tmp_path / "run"))
    told = json.loads((out / "run.json").read_text())
    assert told.pop("gradient_filter") == "fp8"
    assert folder.load(out).loss.gradient_filter == "fp8"
    (out / "run.json").write_text(json.dumps(told))
    before = folder.load(out)
    assert before.loss.gradient_filter == "auto"
    assert "gradient_filter" in TrainConfig.of(out=out).changed_since(before)


def killed(function: str):
    """A kill in place of that function's first call."""
    return mock.patch(function, side_effect=KeyboardInterrupt)


def test_a_kill_while_the_flags_are_written_leaves_a_folder_for_the_same_command(tmp_path):
    config = TrainConfig.of(out=tmp_path / "run", seed=3)
    with killed("os.replace"), pytest.raises(KeyboardInterrupt):
        folder.claim(config)
    assert os.listdir(tmp_path / "run") == ["run.json.tmp"]
    assert folder.load(folder.claim(config)).run.seed == 3


@pytest.mark.parametrize("function", ["shutil.rmtree", "os.replace"])
def test_a_kill_while_an_old_run_is_removed_leaves_one_that_can_be(tmp_path, function):
    out = folder.claim(TrainConfig.of(out=tmp_path / "run", seed=3))
    (out / folder.CHECKPOINTS / "5").mkdir(parents=True)
    config = TrainConfig.of(out=out, seed=4, overwrite=True)
    with killed(function), pytest.raises(KeyboardInterrupt):
        folder.claim(config)
    assert folder.load(out).run.seed == 3
    assert folder.load(folder.claim(config)).run.seed == 4
    assert os.listdir(out) == ["run.json"]
