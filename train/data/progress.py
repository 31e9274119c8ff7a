"""How far a long preparation is: a bar in a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""From one line to the next; what takes less says nothing."""


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows on stderr that `what` goes on, until the context ends.

    Gives the function to call with how many more of `total` are done.
    """
    show = _bar if sys.stderr.isatty() else _lines
    with show(what, total) as advance:
        yield advance


@contextlib.contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def _lines(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A thread of its own, as some of what takes long is one call that says nothing itself."""
    done = 0
    start = time.monotonic()
    finished = threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        done += count

    def report() -> None:
        while not finished.wait(SECONDS):
            far = f"{done:,}" + (f" of {total:,}" if total else "") + ", " if done else ""
            logger.info("%s: %s%.0f s", what, far, time.monotonic() - start)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        finished.set()
        thread.join()
