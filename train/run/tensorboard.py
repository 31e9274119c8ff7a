"""A run's scalars for TensorBoard."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Within it an import of the module fails as if it were not installed, unless it is there."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if sys.modules.get(module, sys) is None:  # another may have imported it meanwhile
            del sys.modules[module]


with _hidden("torch"):  # whose import takes tensorboardX seconds, for a type that it would look for
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import (  # protobuf makes the classes at import
        Event,  # pyright: ignore[reportAttributeAccessIssue]
        SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from tensorboardX.summary import scalar


class TensorBoard:
    """Scalars in TensorBoard's event format, one file a start, flushed at every write.

    The writer underneath `tensorboardX.SummaryWriter`, without its queue and thread: what sits in
    the queue is lost with the process. Without a folder nothing is written.
    """

    def __init__(self, folder: Path | None, start_step: int):
        self._writer = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Names resolve seconds; the process and step keep two quick starts in two files.
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{start_step}")
        # Asks TensorBoard to hide what earlier files hold from this step on.
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(wall_time=time.time(), step=start_step + 1, session_log=restart)
        )
        self._writer.flush()

    def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
        if self._writer is None:
            return
        for name, value in scalars.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
