from pathlib import Path

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
