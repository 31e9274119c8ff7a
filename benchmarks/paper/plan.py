"""A list of commands that is worked off in pieces: what is done is skipped, time may run out."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from benchmarks.measure import report
from benchmarks.measure.runner import current_commit
from benchmarks.paper.worker import Worker

NOT_DONE = 75
"""Exit status: time was up, and the same command goes on (EX_TEMPFAIL)."""
LEAST_SECONDS = 20
"""Seconds that have to be left for a step to begin."""
RECORD = "steps.json"
BEGAN = "began"
LOCK = ".lock"
"""Ends the name of a lock's file."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, and how to see that it is done."""

    name: str
    module: str
    """Whose `main` takes the flags and returns an exit status."""
    flags: tuple[str, ...]
    done: Callable[[], bool]

    @property
    def command(self) -> str:
        """As it is typed."""
        return shlex.join(("python", "-m", self.module.removesuffix(".__main__"), *self.flags))


def work(
    steps: Iterable[Step],
    out: pathlib.Path,
    minutes: float | None = None,
    commit: str | None = None,
    what: str = "steps",
) -> int:
    """Takes the steps in order, in one process, until they are done or time is up.

    What a step does when it is told to stop (SIGTERM) is its own affair: the trainer saves its
    state, an evaluation keeps its answers. A step that fails is listed, and those behind it that do
    not need it go on; the next call tries it again. `steps.json` in `out` keeps each command with
    its status, seconds and commit, git's if None; one that was killed with this process is there as
    "began".

    Returns:
      0 when all is done, 1 if a step failed, `NOT_DONE` if time was up, 128 + n after signal n.

    Several processes may work in `out`, each at something else, as `what` names it.

    Raises:
      ValueError: if another process is at work at the same in `out`, be it a step whose caller was
        killed.
    """
    with alone(out, what) as lock, Worker(keep_open=(lock,)) as worker:
        return _work(steps, worker, out, minutes, commit or current_commit())


@contextlib.contextmanager
def alone(out: pathlib.Path, what: str) -> Iterator[int]:
    """Holds a lock on what is done in the folder, and gives its file: who inherits that holds the
    lock as well."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{what}{LOCK}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out {out}: another process is at work there at {what}, which may be a step"
                " whose command was killed: wait for its end, then give the same command again"
            ) from None
        yield file.fileno()


@contextlib.contextmanager
def in_turn(folder: pathlib.Path) -> Iterator[None]:
    """For what takes moments, and all processes at work in the folder write: each waits for its
    turn."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _work(
    steps: Iterable[Step], worker: Worker, out: pathlib.Path, minutes: float | None, commit: str
) -> int:
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
        print(f"{step.name}: {step.command}", flush=True)
        began = time.monotonic()
        _record(out, step, BEGAN, 0.0, commit)
        status, stopped = worker.run(step.module, step.flags, left)
        said = "done" if step.done() else f"exit {status}"
        _record(out, step, said, time.monotonic() - began, commit)
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


def _record(out: pathlib.Path, step: Step, status: str, seconds: float, commit: str) -> None:
    path = out / RECORD
    row = {
        "step": step.name,
        "command": step.command,
        "status": status,
        "seconds": round(seconds, 1),
        "commit": commit,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with in_turn(out):
        rows = json.loads(path.read_text()) if path.exists() else []
        # The newest of this step, so that one that was killed before stays as it is.
        begun = [i for i, it in enumerate(rows) if (it["step"], it["status"]) == (step.name, BEGAN)]
        if status != BEGAN and begun:
            del rows[begun[-1]]
        report.write_json([*rows, row], path)
