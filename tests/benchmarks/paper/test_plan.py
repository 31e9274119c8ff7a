"""A plan is worked off in pieces: skipped, stopped, failed and gone on with."""

import fcntl
import json
import os
import pathlib
import sys

import pytest

from benchmarks.paper import plan
from benchmarks.paper.plan import Step


def writes(path: pathlib.Path, *before: str) -> Step:
    """A step that makes a file, after these lines."""
    code = "\n".join((*before, f"open({str(path)!r}, 'w').close()"))
    return Step(path.name, (sys.executable, "-c", code), path.exists)


def statuses(out):
    return [(row["step"], row["status"]) for row in json.loads((out / plan.RECORD).read_text())]


def test_what_is_done_is_not_done_again_and_what_failed_is_listed(tmp_path, capfd):
    one, three = tmp_path / "one", tmp_path / "three"
    fails = Step("two", (sys.executable, "-c", "raise SystemExit(3)"), lambda: False)
    steps = [writes(one), fails, writes(three)]
    assert plan.work(steps, tmp_path, None) == 1
    assert three.exists()  # a failure does not take the others with it
    assert statuses(tmp_path) == [("one", "done"), ("two", "exit 3"), ("three", "done")]
    said = capfd.readouterr()
    assert "failed: two" in said.err
    assert plan.work([steps[0], steps[2]], tmp_path, None) == 0
    assert "done already: one" in capfd.readouterr().out
    assert len(statuses(tmp_path)) == 3


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
    assert plan.work(steps, tmp_path, None) == 0
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
    assert plan.work(steps, tmp_path, None) == 0
    with pytest.raises(ValueError, match="another process is at work there"):
        plan.work(steps, tmp_path, None)
    fifo.write_text("")  # which ends it
    with (tmp_path / plan.LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert plan.work(steps, tmp_path, None) == 0


@pytest.mark.parametrize("status", [0, 5])
def test_a_status_is_handed_on(status):
    command = (sys.executable, "-c", f"raise SystemExit({status})")
    assert plan.execute(command, None) == (status, "")
