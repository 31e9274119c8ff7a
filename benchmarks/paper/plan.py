"""A list of commands that is worked off in pieces: what is done is skipped, time may run out."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from benchmarks.measure import report
from benchmarks.measure.runner import current_commit

NOT_DONE = 75
"""Exit status: time was up, and the same command goes on (EX_TEMPFAIL)."""
LEAST_SECONDS = 20
"""Of the time that is left, for a step to begin."""
RECORD = "steps.json"
LOCK = "steps.lock"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, and how to see that it is done."""

    name: str
    command: tuple[str, ...]
    """Of Python: a module and its flags."""
    done: Callable[[], bool]


def python(module: str, *flags: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, flags))


def work(steps: Iterable[Step], out: pathlib.Path, minutes: float | None) -> int:
    """Takes the steps in order, until they are done or time is up.

    What a step does when it is told to stop (SIGTERM) is its own affair: the trainer saves its
    state, an evaluation keeps its answers. A step that fails is listed, and those behind it that do
    not need it go on; the next call tries it again. `steps.json` in `out` keeps each command with
    its status, seconds and commit.

    Returns:
      0 when all is done, 1 if a step failed, `NOT_DONE` if time was up, 128 + n after signal n.

    Raises:
      ValueError: if another process is at work in `out`, be it a step whose caller was killed.
    """
    with alone(out) as lock:
        return _work(steps, out, minutes, lock)


@contextlib.contextmanager
def alone(out: pathlib.Path) -> Iterator[int]:
    """Holds a lock on the folder, and gives its file: who inherits that holds the lock as well."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out {out}: another process is at work there, which may be a step whose command"
                " was killed: wait for its end, then give the same command again"
            ) from None
        yield file.fileno()


def _work(steps: Iterable[Step], out: pathlib.Path, minutes: float | None, lock: int) -> int:
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    failed: list[str] = []
    for step in steps:
        if step.done():
            print(f"done already: {step.name}", flush=True)
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left < LEAST_SECONDS:
            print(f"time is up before {step.name}: the same command goes on", flush=True)
            return NOT_DONE
        print(f"{step.name}: {shlex.join(step.command[1:])}", flush=True)
        began = time.monotonic()
        status, stopped = execute(step.command, left, keep_open=(lock,))
        _record(out, step, "done" if step.done() else f"exit {status}", time.monotonic() - began)
        if stopped == "time":
            print(f"time is up in {step.name}: the same command goes on", flush=True)
            return NOT_DONE
        if stopped:
            return 128 + int(stopped)
        if not step.done():
            failed.append(step.name)
    for name in failed:
        print(f"failed: {name}; the same command tries it again", file=sys.stderr)
    return 1 if failed else 0


def execute(
    command: tuple[str, ...], seconds: float | None, keep_open: tuple[int, ...] = ()
) -> tuple[int, str]:
    """Runs a command; asks it to stop when its time is up or this process is asked to.

    It inherits the files in `keep_open`. Returns its exit status, and why it was stopped: "time",
    the number of the signal, or "".
    """
    stopped = ""

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = stopped or str(signum)
        child.send_signal(signum)

    with subprocess.Popen(command, process_group=0, pass_fds=keep_open) as child:
        before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            try:
                status = child.wait(seconds)
            except subprocess.TimeoutExpired:
                stopped = stopped or "time"
                child.send_signal(signal.SIGTERM)
                status = child.wait()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
    return status, stopped


def _record(out: pathlib.Path, step: Step, status: str, seconds: float) -> None:
    path = out / RECORD
    rows = json.loads(path.read_text()) if path.exists() else []
    rows.append(
        {
            "step": step.name,
            "command": shlex.join(("python", *step.command[1:])),
            "status": status,
            "seconds": round(seconds, 1),
            "commit": current_commit(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    report.write_json(rows, path)
