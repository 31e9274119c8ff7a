"""SIGTERM and SIGINT: obeyed at once where nothing is lost, held back where something would be."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stop_at_once(program: str) -> None:
    """From now on, a signal ends this process with one line and the status 128 + n.

    Not by an exception, which an import, a destructor or a callback may swallow or print with its
    traceback. To be called before the imports that take seconds. What is being written then is
    left as by SIGKILL, which every file here survives.
    """

    def stop(signum: int, _frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        os.write(2, f"{program}: {name}: stopped\n".encode())
        os._exit(128 + signum)

    for signum in SIGNALS:
        signal.signal(signum, stop)


class StopRequest:
    """What the signals have asked for so far."""

    signum: int | None = None
    """The signal that came; None as long as none did."""
    _at_once = False

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal abandons what is done inside, instead of waiting for its end; but not what other
        processes do as well, and would wait in."""
        try:
            try:
                self._at_once = self._alone
                yield
            finally:
                self._at_once = False
        except _Abandon:
            self._at_once = False  # the signal may have come in the `finally` above

    def _receive(self, signum: int) -> None:
        self.signum = signum
        if self._at_once:
            raise _Abandon


@contextlib.contextmanager
def stop_requests(*, alone: bool = True) -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or SIGINT is only noted; a second one does what it always does."""
    request = StopRequest(alone=alone)
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def receive(signum: int, _frame: FrameType | None) -> None:
        restore()
        request._receive(signum)

    for signum in SIGNALS:
        signal.signal(signum, receive)
    try:
        yield request
    finally:
        restore()


class _Abandon(BaseException):
    """Not an Exception, so that no library's handler swallows it."""
