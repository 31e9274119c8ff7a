"""What a command does first, before the imports that take seconds. Imports nothing of them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import files
from train.run import signals

COMPILED = "JAX_COMPILATION_CACHE_DIR"
"""JAX's own variable: a folder, or nothing to keep no programs."""
LOOKED = "looked"
"""Its time is that of the last look for torn programs."""
ZSTD = b"\x28\xb5\x2f\xfd"
OBJECTS = 100_000
"""So many new ones before Python looks for cycles among them. At its own 2,000 that is a fifth of
the time in which a data set is read and encoded."""
NOBODY_READS = 128 + signal.SIGPIPE
"""The exit status of a program whose output nobody reads any more, as behind `head`."""


def begin(program: str) -> None:
    """Makes a signal end the process in one line, what `train` logs be shown as it is, Python look
    for cycles less often, and XLA keep the programs that it compiles.

    The programs lie in the user's cache folder, unless JAX's own variables say otherwise: the next
    process, a resumed run or the next of a sweep, loads in seconds what took a minute. A program
    that is loaded gives the same bits as the one that was saved. Without such a folder none are
    kept.
    """
    signals.stop_at_once(program)
    gc.set_threshold(OBJECTS)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)  # before a library does
    logging.getLogger("train").setLevel(logging.INFO)
    programs = files.default_cache_dir() / "programs"
    with contextlib.suppress(OSError):
        if COMPILED not in os.environ:
            programs.mkdir(parents=True, exist_ok=True)
            remove_torn(programs)
            os.environ[COMPILED] = str(programs)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def remove_torn(programs: Path) -> None:
    """Removes the programs that a kill left half written. JAX does not: it would warn of each, and
    compile it again, in every process to come.

    Only those are read that are newer than the last time.
    """
    looked = programs / LOOKED
    last = looked.stat().st_mtime_ns if looked.exists() else 0
    looked.touch()
    for program in programs.glob("*-cache"):
        if program.stat().st_mtime_ns >= last and not _is_whole(program.read_bytes()):
            program.unlink(missing_ok=True)


def _is_whole(compressed: bytes) -> bool:
    try:
        _library(compressed).decompress(compressed)
    except ImportError:
        return True  # for all that is known here
    except Exception:  # each library's own
        return False
    return True


def _library(compressed: bytes) -> Any:
    """What JAX compressed it with: Zstandard where it is there."""
    if not compressed.startswith(ZSTD):
        return zlib
    try:
        return importlib.import_module("compression.zstd")  # of Python 3.14
    except ImportError:
        return importlib.import_module("zstandard")


def run(main: Callable[[], int]) -> int:
    """The exit status of a command. That nobody reads it any more ends it, and is no error."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What Python itself still flushes at its end goes nowhere, instead of failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
