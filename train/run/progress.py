"""How a run is shown: on a terminal, or in a file or a pipe, whose reader may go away."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


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


class ProgressBar:
    """One live line on a terminal."""

    def __init__(
        self,
        console: rich.console.Console,
        total_steps: int,
        start_step: int,
        _clock: Callable[[], float],
    ):
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "training", total=total_steps, completed=start_step, measured=""
        )
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, row: Mapping[str, int | float | None]) -> None:
        self._progress.update(self._task, completed=row["step"], measured=measured(row))

    def close(self) -> None:
        self._progress.stop()


class PlainLines:
    """Lines for a log file: the first and the last row, and one every few seconds between them."""

    def __init__(
        self,
        console: rich.console.Console,
        total_steps: int,
        start_step: int,
        clock: Callable[[], float],
    ):
        self._console, self._clock = console, clock
        self._total_steps, self._start_step = total_steps, start_step
        self._began = clock()
        self._next_line = self._began

    def advance(self, step: int) -> None:
        pass

    def show(self, row: Mapping[str, int | float | None]) -> None:
        now, step = self._clock(), int(row["step"] or 0)
        if now < self._next_line and step != self._total_steps:
            return
        self._next_line = now + SECONDS_BETWEEN_LINES
        left = (now - self._began) / (step - self._start_step) * (self._total_steps - step)
        width = len(str(self._total_steps))
        line = f"step {step:{width}}/{self._total_steps}  {measured(row)}  {duration(left)} left"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        pass


def measured(row: Mapping[str, int | float | None]) -> str:
    """The loss and the speed, in a width that does not jump about."""
    loss, speed = row.get("loss"), row.get("tokens_per_second")
    return "  ".join(
        [
            "loss    n/a" if loss is None else f"loss {loss:6.4f}",
            "    n/a tokens/s" if speed is None else f"{speed:7,.0f} tokens/s",
        ]
    )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:20."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
