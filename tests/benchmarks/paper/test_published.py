"""Published records from a folder, from the hub, and from neither."""

import json

import huggingface_hub
import pytest

from benchmarks.paper import betas, published

ALPACA = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(30)]
DOLLY = [
    {"instruction": "Why?", "context": "It is.", "response": "So.", "category": "open_qa"},
    {"instruction": "Who?", "context": "", "response": " ", "category": "open_qa"},
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A copy of what was asked for, as huggingface_hub keeps it."""
    copy = tmp_path / "hub"
    (copy / "data").mkdir(parents=True)
    (copy / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOLLY))
    rows = "".join(json.dumps(row) + "\n" for row in ALPACA)
    (copy / "data" / "train-0.parquet").write_text(rows)  # whose form is seen from within
    asked = []

    def download(repository, **options):
        asked.append((repository, options["repo_type"], *options["allow_patterns"]))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.fixture
def no_network(monkeypatch):
    def download(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def written(name, folder, path):
    published.write_instructions(name, folder, path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_come_from_the_hub_in_the_form_of_a_folders(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "ALPACA_SAMPLE", 5)
    some = written("alpaca", None, tmp_path / "a.jsonl")
    assert len(some) == 5
    assert all(row in ALPACA for row in some)
    assert some == written("alpaca", tmp_path, tmp_path / "again.jsonl")  # drawn by a seed
    assert written("dolly", None, tmp_path / "d.jsonl") == [
        {"instruction": "Why?", "input": "It is.", "output": "So."}
    ]
    assert hub[0] == ("tatsu-lab/alpaca", "dataset", "data/train-*.parquet")
    assert hub[-1] == ("databricks/databricks-dolly-15k", "dataset", "*.jsonl")


def test_a_folder_is_asked_before_the_hub(no_network, tmp_path):
    (tmp_path / "dolly").mkdir()
    (tmp_path / "dolly" / "a.jsonl").write_text(json.dumps(DOLLY[0]) + "\n")
    assert len(written("dolly", tmp_path, tmp_path / "made.jsonl")) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"there is no \*\.jsonl and no \*\.parquet in"),
        ('{"prompt": "p"}', "the files of alpaca hold other records than published"),
        ("not JSON", "is not JSON"),
    ],
)
def test_what_is_no_copy_is_refused(rows, message, tmp_path):
    (tmp_path / "alpaca").mkdir()
    if rows is not None:
        (tmp_path / "alpaca" / "a.jsonl").write_text(rows + "\n")
    with pytest.raises(ValueError, match=message):
        published.write_instructions("alpaca", tmp_path, tmp_path / "made.jsonl")
    assert not (tmp_path / "made.jsonl").exists()


def test_what_cannot_be_had_is_told_in_one_line_before_anything_runs(no_network, tmp_path, capsys):
    for tasks, what in (("arc-easy", "questions of arc-easy"), ("", "records of alpaca")):
        given = ["--out", str(tmp_path / "out"), "--tasks", *tasks.split()]
        if not tasks:
            arc = tmp_path / "arc"
            arc.mkdir()
            for split in ("test", "validation"):
                (arc / f"Easy-{split}.jsonl").touch()
            given += ["arc-easy", "--data-folder", str(tmp_path)]
        assert betas.EXPERIMENT.main(given) == 2
        said = capsys.readouterr().err
        assert what in said
        assert "Hugging Face hub" in said
        assert "--data-folder names" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
