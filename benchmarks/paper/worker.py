"""One process that works off commands of Python modules, one after the other.

JAX starts once, and what is compiled for one command serves all that compute with the same shapes:
seeds and learning rates are numbers that a compiled step is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import IO, Self

from train import start

GRACE = 45.0
"""Seconds for a command to stop in when it is told to. Then it is killed, which costs what it did
since its last checkpoint and damages nothing."""


class Worker:
    """The process, from without. It is there while a command needs it.

    A command that fails, or is told to stop, takes the process with it, so that the next one begins
    in a new one.

    Args:
      keep_open: files that the process inherits.
    """

    def __init__(self, keep_open: tuple[int, ...] = ()) -> None:
        self._keep_open = keep_open
        self._running: _Running | None = None

    def run(self, module: str, flags: Sequence[str], seconds: float | None) -> tuple[int, str]:
        """Calls the module's `main` with the flags, and asks it to stop (SIGTERM) when its time is
        up, or by whatever signal this process is asked to.

        Returns its exit status, and why it was stopped: "time", the number of the signal, or "".
        """
        running = self._running = self._running or _Running.start(self._keep_open)
        stopped = ""

        def pass_on(signum: int, _frame: object) -> None:
            nonlocal stopped
            stopped = stopped or str(signum)
            running.process.send_signal(signum)

        before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            running.tell(module, *flags)
            if not running.has_answered(seconds):
                stopped = stopped or "time"
                running.process.send_signal(signal.SIGTERM)
                if not running.has_answered(GRACE):
                    running.process.kill()
            answer = running.answers.readline()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if answer and not int(answer):
            return 0, stopped
        own = self.end()
        return int(answer) if answer else own, stopped

    def end(self) -> int:
        """Lets the process end, if there is one; its exit status."""
        running, self._running = self._running, None
        return 0 if running is None else running.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.end()


@dataclasses.dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    commands: IO[str]
    answers: IO[str]

    @classmethod
    def start(cls, keep_open: tuple[int, ...]) -> Self:
        (commands_in, commands), (answers, answers_out) = os.pipe(), os.pipe()
        its_own = commands_in, answers_out
        process = subprocess.Popen(
            (sys.executable, "-m", __name__, *map(str, its_own)),
            stdin=subprocess.DEVNULL,
            process_group=0,  # so that Ctrl-C at the terminal is passed on, once
            pass_fds=(*keep_open, *its_own),
        )
        for fd in its_own:
            os.close(fd)
        return cls(process, open(commands, "w"), open(answers))

    def tell(self, *command: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which its answer tells
            print(json.dumps(command), file=self.commands, flush=True)

    def has_answered(self, seconds: float | None) -> bool:
        """Waits that long for an answer, or the end of all answers."""
        return bool(select.select([self.answers], [], [], seconds and max(seconds, 0.0))[0])

    def end(self) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.commands.close()
        self.answers.close()
        return self.process.wait()


def serve(commands: int, answers: int) -> None:
    """The process from within: a command a line from one file, its status a line to the other."""
    for fd in (commands, answers):
        os.set_inheritable(fd, False)
    with open(commands) as lines:
        for line in lines:
            status = _called(*json.loads(line))
            with contextlib.suppress(BrokenPipeError):  # whoever asked was killed
                os.write(answers, f"{status}\n".encode())


def _called(module: str, *flags: str) -> int:
    try:
        return int(importlib.import_module(module).main(flags) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        gc.collect()  # arrays of the device, which the next command has need of


if __name__ == "__main__":
    start.begin("benchmarks.paper")
    serve(*map(int, sys.argv[1:]))
