"""A plan is worked off in pieces: skipped, stopped, failed and gone on with."""

import concurrent.futures
import fcntl
import json
import os
import pathlib

import pytest
from paths import ROOT

from benchmarks.paper import plan, worker
from benchmarks.paper.plan import Step


@pytest.fixture(autouse=True)
def piece(tmp_path, monkeypatch):
    """A module for workers, whose `main` runs a program."""
    (tmp_path / "piece.py").write_text("def main(flags):\n    exec(flags[0], {})\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))


def runs(name: str, *lines: str, done) -> Step:
    return Step(name, "piece", ("\n".join(lines),), done)


def writes(path: pathlib.Path, *before: str) -> Step:
    """A step that makes a file, after these lines."""
    return runs(path.name, *before, f"open({str(path)!r}, 'w').close()", done=path.exists)


def statuses(out):
    return [(row["step"], row["status"]) for row in json.loads((out / plan.RECORD).read_text())]


def test_what_is_done_is_not_done_again_and_what_failed_is_listed(tmp_path, capfd):
    one, three = tmp_path / "one", tmp_path / "three"
    fails = runs("two", "raise SystemExit(3)", done=lambda: False)
    steps = [writes(one), fails, writes(three)]
    assert plan.work(steps, tmp_path) == 1
    assert three.exists()  # a failure does not take the others with it
    assert statuses(tmp_path) == [("one", "done"), ("two", "exit 3"), ("three", "done")]
    said = capfd.readouterr()
    assert "failed: two" in said.err
    assert plan.work([steps[0], steps[2]], tmp_path) == 0
    assert "done already: one" in capfd.readouterr().out
    assert len(statuses(tmp_path)) == 3


def test_a_step_has_a_line_from_its_beginning(tmp_path):
    """Which is left of it if the whole is killed; an older one is not taken for its own."""
    seen = tmp_path / "seen"
    copies = f"import shutil; shutil.copy({str(tmp_path / plan.RECORD)!r}, {str(seen)!r})"
    assert plan.work([writes(tmp_path / "one", copies)], tmp_path) == 0
    began = seen.read_text()
    assert [row["status"] for row in json.loads(began)] == ["began"]
    assert statuses(tmp_path) == [("one", "done")]
    (tmp_path / plan.RECORD).write_text(began)
    (tmp_path / "one").unlink()
    assert plan.work([writes(tmp_path / "one")], tmp_path) == 0
    assert statuses(tmp_path) == [("one", "began"), ("one", "done")]


def test_time_that_is_up_stops_a_step_gently_and_the_next_call_goes_on(tmp_path, monkeypatch):
    """The step saves when it is asked to stop, as the trainer does."""
    saved, done = tmp_path / "saved", tmp_path / "done"
    monkeypatch.setattr(plan, "LEAST_SECONDS", 0.0)
    waits = (
        "import pathlib, signal, sys",
        f"saved = pathlib.Path({str(saved)!r})",
        "def stop(*_): saved.write_text('1'); sys.exit(143)",
        "signal.signal(signal.SIGTERM, stop)",
        "saved.exists() or signal.pause()",
    )
    steps = [writes(done, *waits), writes(tmp_path / "after")]
    assert plan.work(steps, tmp_path, 1.0 / 60) == plan.NOT_DONE
    assert not (tmp_path / "after").exists()
    if not saved.exists():  # the machine is so busy that Python did not come to its first line
        saved.write_text("1")
    assert plan.work(steps, tmp_path) == 0
    assert statuses(tmp_path)[-2:] == [("done", "done"), ("after", "done")]


def test_no_step_begins_that_has_no_time(tmp_path):
    monkey = writes(tmp_path / "one")
    assert plan.work([monkey], tmp_path, 0.1) == plan.NOT_DONE
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / plan.RECORD).exists()


def test_what_outlives_its_command_keeps_others_away(tmp_path):
    """As a step does whose command was killed."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    outlives = f"os.fork() or (open({str(fifo)!r}).read(), os._exit(0))"
    steps = [writes(tmp_path / "one", "import os", outlives)]
    assert plan.work(steps, tmp_path) == 0
    with pytest.raises(ValueError, match="another process is at work there at steps"):
        plan.work(steps, tmp_path)
    assert plan.work([writes(tmp_path / "two")], tmp_path, what="something else") == 0
    fifo.write_text("")  # which ends it
    with (tmp_path / f"steps{plan.LOCK}").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert plan.work(steps, tmp_path) == 0


def test_what_all_processes_write_is_written_in_turn(tmp_path):
    count = tmp_path / "count"
    count.write_text("0")

    def add(_) -> None:
        with plan.in_turn(tmp_path):
            before = int(count.read_text())
            count.write_text(str(before + 1))

    with concurrent.futures.ThreadPoolExecutor(8) as others:
        list(others.map(add, range(200)))
    assert count.read_text() == "200"


def test_steps_share_a_process_until_one_fails(tmp_path):
    """What is compiled for one serves the next; what a failed one leaves does not."""
    pids = tmp_path / "pids"
    note = f"import os; print(os.getpid(), file=open({str(pids)!r}, 'a'))"
    names = ("one", "two", "three")
    steps = [writes(tmp_path / name, note) for name in names]
    fails = runs("fails", note, "1 / 0", done=lambda: False)
    assert plan.work([*steps[:2], fails, steps[2]], tmp_path, commit="abc") == 1
    one, two, failed, three = pids.read_text().split()
    assert one == two == failed != three
    rows = json.loads((tmp_path / plan.RECORD).read_text())
    assert [row["status"] for row in rows] == ["done", "done", "exit 1", "done"]
    assert {row["commit"] for row in rows} == {"abc"}


def test_a_process_that_dies_costs_its_step_alone(tmp_path):
    dies = runs("dies", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", done=bool)
    assert plan.work([dies, writes(tmp_path / "after")], tmp_path) == 1
    assert statuses(tmp_path) == [("dies", "exit -9"), ("after", "done")]


def test_what_does_not_stop_in_time_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(worker, "GRACE", 0.1)
    deaf = ("import signal", "signal.signal(signal.SIGTERM, lambda *_: None)", "while True:")
    steps = [writes(tmp_path / "one", *deaf, "    signal.pause()")]
    assert plan.work(steps, tmp_path, 1 / 60) == plan.NOT_DONE
    assert not (tmp_path / "one").exists()


def test_a_step_is_shown_as_it_is_typed():
    step = Step("it", "train.__main__", ("--data", "a b"), bool)
    assert step.command == "python -m train --data 'a b'"
