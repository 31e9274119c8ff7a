"""Where a run is shown: a terminal, a file or a pipe, whose reader may go away."""

from __future__ import annotations

import os
import sys

import rich.console


class Console(rich.console.Console):
    """rich's console, but a pipe that nobody reads any more silences it and does not end the run.

    In a file or a pipe a table is as wide as it needs to be: nobody's window cuts it there.
    """

    def __init__(self) -> None:
        super().__init__()
        if not self.is_terminal:
            self.width = max(self.width, 120)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python itself still flushes at its end goes nowhere, instead of failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
