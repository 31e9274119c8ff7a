"""A whole run's command: what it refuses, how it kills, and that it sees what differs."""

import json
import signal

import pytest

from benchmarks import whole_run
from train.__main__ import main as train

TRAINER = ["--", "--model", "nano", "--data", "a.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["new", *TRAINER[:3]], "--data is missing: the trainer's flags stand behind --"),
        (["new"], "--model is missing: the trainer's flags stand behind --"),
        (["new", *TRAINER, "--out", "there"], "--out is not to be given: the runs lie in new"),
        (["new", "--limit", "0", *TRAINER], "--limit must be at least 1, not 0"),
        (["new", "--json", ".", *TRAINER], "--json . is a folder: name a file"),
        ([".", *TRAINER], ". is there already: name a new folder"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert whole_run.main(flags) == 2
    error = capsys.readouterr().err
    assert error == f"benchmarks.whole_run: {message}\n"


@pytest.fixture
def work(tmp_path):
    options = whole_run.parse([str(tmp_path / "new"), *TRAINER])
    options.folder.mkdir()
    work = whole_run.Work(options, "this one")
    work.environment["PYTHONPATH"] = str(tmp_path)
    return work


def test_a_process_is_killed_when_it_is_time(work, tmp_path):
    (tmp_path / "endless.py").write_text(
        "import pathlib, sys, time\n"
        "print('begun', flush=True)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while True: time.sleep(1)\n"
    )
    ready = tmp_path / "ready"
    printed = work._run("killed", "endless", str(ready), kill=ready.exists)
    assert printed == "begun\n"
    assert work.found.processes["killed"].status == -signal.SIGKILL


def test_a_process_that_fails_or_outlives_its_kill_stops_the_part(work, tmp_path):
    (tmp_path / "short.py").write_text("import sys; print('oh'); sys.exit(int(sys.argv[1]))\n")
    with pytest.raises(RuntimeError, match=r"fails ended with status 3: …oh"):
        work._run("fails", "short", "3")
    with pytest.raises(RuntimeError, match=r"ends ended with status 0: …oh"):
        work._run("ends", "short", "0", kill=lambda: False)
    assert work._run("works", "short", "0") == "oh\n"


def test_what_only_one_has_or_has_otherwise_is_different():
    assert whole_run.different({1: "a", 2: "b", 3: "c"}, {1: "a", 2: "d", 4: "e"}) == [2, 3, 4]
    timed = {"step": 1, "loss": 2.0, "tokens": 8, "tokens_per_second": 4.0, "input_wait": 0.1}
    assert whole_run.by_step([timed]) == {1: {"step": 1, "loss": 2.0, "tokens": 8}}
    assert whole_run.seconds_of(timed) == 2.0


@pytest.mark.slow
def test_every_array_of_a_checkpoint_is_compared(tmp_path):
    data = tmp_path / "records.jsonl"
    record = {"prompt": "ant bee cat", "completion": "dog eel fox"}
    data.write_text("".join(json.dumps(record | {"prompt": f"ant {i}"}) + "\n" for i in range(40)))
    runs = {name: tmp_path / name for name in ("one", "other")}
    for name, out in runs.items():
        flags = ["--data", data, "--out", out, "--model", "nano", "--vocab-size", "300"]
        flags += ["--max-length", "32", "--steps", "1", "--held-out", "0"]
        flags += ["--seed", "7" if name == "other" else "0"]
        assert train([str(flag) for flag in flags]) == 0
    one, other = (whole_run.digests(out) for out in runs.values())
    assert any("opt_state" in name for name in one)
    assert any("embedding" in name for name in one)
    assert whole_run.together(one) != whole_run.together(other)
    moved = whole_run.different(one, other)
    assert all(any(kind in name for name in moved) for kind in ("params", "opt_state", "key"))
    assert not any(name == "['step']" for name in moved)
