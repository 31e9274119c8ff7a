"""What a run measures while it trains: `metrics.jsonl`, TensorBoard events, and what is shown.

    with Monitor(out, total_steps, start_step=resumed_step) as monitor:
        for step in range(resumed_step + 1, total_steps + 1):
            with monitor.waiting():         # time in which the host waits for a batch
                batch = next(batches)
            ...
            monitor.step(step, {"loss": loss, "grad_norm": norm, "tokens": count, ...})
            with monitor.paused():          # time that is not training: evaluation, checkpoints
                monitor.evaluation(step, {"nll": ..., "ece": ...})

Steps are numbered from 1. A row is handed to the operating system before `step` returns, so a
SIGKILL loses at most the row being written, and the next start repairs even a half-written one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import rich.console

from train import files
from train.run.folder import METRICS, TENSORBOARD
from train.run.progress import Console, PlainLines, ProgressBar
from train.run.tensorboard import TensorBoard
from train.run.tracker import Tracker

HELD_OUT = "held_out_"
TOKEN_NLL = f"{HELD_OUT}token_nll"


class Monitor:
    """Follows one run; a context manager.

    Args:
      out: the run's folder.
      total_steps: the step at which the run ends.
      log_every: steps from one row to the next; the last step always has a row.
      start_step: the step of the checkpoint that the run continues from, 0 for a new run. Rows of
        later steps, left by the run that was cut off, are removed.
      tracker: gets a copy of every row, for Weights & Biases.
      silent: write and show nothing, where another process of the run does.
      console: where the bar is drawn; plain lines, at most one every few seconds, if it is not a
        terminal.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        out: Path,
        total_steps: int,
        *,
        log_every: int = 1,
        start_step: int = 0,
        tracker: Tracker | None = None,
        silent: bool = False,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"{start_step=} must lie between 0 and {total_steps=}")
        self.total_steps = total_steps
        self._start_step = start_step
        self._log_every = log_every
        self._out = out
        self._tracker = tracker or Tracker(None)
        self._clock = clock
        self._silent = silent
        self._console = console or Console()
        self._console.quiet |= silent
        self._tokens: list[Any] = []  # of the steps since the last row, perhaps still on the device
        self._paused = 0.0
        self._waited = 0.0
        self._all_seconds = self._all_waited = 0.0
        self.evaluated: dict[int, float | None] = {}
        """The steps that have a row of held-out scores, with the NLL of a token, if it has one."""

    def __enter__(self) -> Self:
        metrics, events = self._out / METRICS, self._out / TENSORBOARD
        if self._silent:
            _, self.evaluated = rows_until(metrics, self._start_step)
            metrics, events = Path(os.devnull), None
        else:
            self._out.mkdir(parents=True, exist_ok=True)
            self.evaluated = cut_rows_after(metrics, self._start_step)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._events = TensorBoard(events, self._start_step)
        show = ProgressBar if self._console.is_terminal else PlainLines
        self._display = show(self._console, self.total_steps, self._start_step, self._clock)
        self._last_row = self._clock()
        return self

    def __exit__(self, exception: type[BaseException] | None, *_more: object) -> None:
        self._display.close()
        self._tracker.close(failed=exception is not None)
        self._events.close()
        self._metrics.close()

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Records that `step` is done.

        Args:
          step: counted from 1.
          values: scalars, arrays on a device allowed: they are read (and waited for) only at
            steps that get a row. `tokens`, the number of tokens in the step's loss, is where
            tokens_per_second comes from: the tokens of all steps since the last row over the
            seconds since then, pauses left out. `input_wait` is the share of these seconds that was
            spent in `waiting`.
        """
        self._tokens.append(values.get("tokens", 0))
        if step % self._log_every and step != self.total_steps:
            self._display.advance(step)
            return
        row = {"step": step, **{name: as_number(value) for name, value in values.items()}}
        tokens = sum(int(count) for count in self._tokens)  # waits for the device: before the clock
        now = self._clock()
        seconds = now - self._last_row - self._paused
        row["tokens_per_second"] = tokens / seconds if seconds > 0 else None
        row["input_wait"] = self._waited / seconds if seconds > 0 else None
        self._all_seconds += seconds
        self._all_waited += self._waited
        self._tokens, self._last_row, self._paused, self._waited = [], now, 0.0, 0.0
        self._write("train", row)
        self._display.show(row)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Records held-out scores at `step`: a row of their own, names prefixed by `held_out_`.

        A step that has such a row, because the run was resumed at its end, gets no second one.
        """
        scores = {name: as_number(value) for name, value in values.items()}
        if scores and step not in self.evaluated:
            row = {f"{HELD_OUT}{name}": value for name, value in scores.items()}
            self._write("held_out", {"step": step, **row})
            self.evaluated[step] = row.get(TOKEN_NLL)
        listed = "  ".join(f"{k} {v:.4g}" for k, v in scores.items() if v is not None)
        self.say(f"step {step}: held-out {listed or 'records: none'}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training time in tokens_per_second."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    @contextlib.contextmanager
    def waiting(self, busy: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Time spent inside is waiting for the input pipeline: it counts as training time.

        Where the device is still `busy` with a step at the end it has not waited. Where it is not
        it waited for no more than this.
        """
        began = self._clock()
        try:
            yield
        finally:
            if not busy():
                self._waited += self._clock() - began

    def say_waited(self) -> None:
        """Prints the share of all training time that was spent in `waiting`, if there was any."""
        if self._all_seconds > 0:
            self.say(f"waited for data in {self._all_waited / self._all_seconds:.2%} of the time")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _write(self, group: str, row: dict[str, int | float | None]) -> None:
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        step = int(row["step"] or 0)
        scalars = {
            f"{group}/{name.removeprefix(HELD_OUT)}": value
            for name, value in row.items()
            if name != "step" and value is not None
        }
        self._events.write(step, scalars)
        self._tracker.write(step, scalars)


def as_number(value: Any) -> int | float | None:
    """A scalar as JSON can hold it, float32 exactly; None for NaN and the infinities."""
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def cut_rows_after(metrics: Path, step: int) -> dict[int, float | None]:
    """Keeps the rows up to `step`, in one atomic replacement; returns and raises what `rows_until`
    does of the steps evaluated."""
    kept, evaluated = rows_until(metrics, step)
    if metrics.exists():
        files.write(metrics, "".join(kept))
    return evaluated


def rows_until(metrics: Path, step: int) -> tuple[list[str], dict[int, float | None]]:
    """The rows up to `step`, and which steps have one of held-out scores, with the NLL of a token,
    if it has one.

    Left out is a last line that a kill left without its end. Any other line that is not a row
    raises ValueError with its number: this file was not written by a run.
    """
    kept, evaluated = [], {}
    if not metrics.exists():
        return kept, evaluated
    for number, line in enumerate(metrics.read_text("utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            if row["step"] > step:
                continue
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{metrics}:{number} is not a row of metrics: {line[:80]!r}."
                " Remove the line to go on"
            ) from error
        kept.append(line)
        if any(name.startswith(HELD_OUT) for name in row):
            evaluated[row["step"]] = row.get(TOKEN_NLL)
    return kept, evaluated
