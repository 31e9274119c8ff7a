"""A result for people: a table a task, with what a reader of it must know."""

from __future__ import annotations

import math
from pathlib import Path

import rich.console
from rich import box
from rich.table import Table

from lsce.calibration.temperature import LIMIT
from train.evaluation.measures import IN_PART, NAMES, SHIFTED
from train.evaluation.results import Measure, Result, Scored, TaskResult
from train.run.progress import Console

PERCENT = ("accuracy", "confidence", "gap", "outside")
WORDS = {
    "choices": "among the letters",
    "vocabulary": "among all tokens",
    "sum": "summed",
    "per_character": "per character",
    "per_token": "per token",
    "temperature": "temperature",
}
MOST_SUBJECTS = 12
"""More are in the file alone."""


def print_result(result: Result, out: Path, console: rich.console.Console | None = None) -> None:
    """Prints every measure with its interval, a column a scoring."""
    console = console or Console()
    for task in result.tasks.values():
        _print_task(task, console)
    if result.tokens is not None:
        columns = {"next token": result.tokens.measures}
        console.print(_table(f"Held-out responses, {result.tokens.n:,} tokens", columns))
    console.print(f"Written to {out}", highlight=False)


def _print_task(task: TaskResult, console: rich.console.Console) -> None:
    columns: dict[str, dict[str, Measure]] = {}
    for name, scored in task.scorings.items():
        columns[WORDS[name]] = scored.measures
        if scored.temperature is not None and name == task.reported:
            columns[f"T = {scored.temperature.value:.4g}"] = scored.temperature.measures
    if task.against is not None:
        columns[f"less {task.against.model}"] = task.against.scorings[task.reported]
    console.print(_table(f"{task.task}, {task.questions:,} questions", columns))
    console.print(caption(task), highlight=False, markup=False)
    subjects = task.scorings[task.reported].subjects
    if 0 < len(subjects) <= MOST_SUBJECTS:
        console.print(_subjects(task.scorings[task.reported]))


def caption(task: TaskResult) -> str:
    """What the table's numbers depend on."""
    where = f"of {task.available:,} " if task.questions < task.available else ""
    notes = [f"{where}{task.data}; {task.shots} shots; prompt {task.prompt}; chance"]
    notes[0] += f" {task.chance:.1%}."
    if task.scorings[task.reported].measures["accuracy"].low is not None:
        notes[0] += f" In brackets 95 % bootstrap intervals over questions. {SHIFTED} {IN_PART}"
    if task.letter_tokens is not None and task.letter_tokens > 1:
        notes.append(
            f"Letters are not one token each here, but up to {task.letter_tokens}: log-likelihoods"
            " are summed."
        )
    if task.shots_dropped:
        notes.append(
            f"{task.shots_dropped:,} of the questions had fewer shots: for want of room, or because"
            " they are one of them."
        )
    if task.left_out:
        notes.append(f"Questions left out, too long without any shot: {task.left_out:,}.")
    scored = task.scorings[task.reported]
    if scored.temperature is not None:
        fitted = scored.temperature
        notes.append(f"T is fitted on {fitted.n:,} questions of {fitted.fitted_on}.")
        if not 1.001 / LIMIT < fitted.value < LIMIT / 1.001:
            notes[-1] += (
                " It is at the end of its range: the model is no better than chance there, or"
                " always right."
            )
    return "\n".join(notes)


def _table(title: str, columns: dict[str, dict[str, Measure]]) -> Table:
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name in NAMES:
        if any(name in measures for measures in columns.values()):
            row = [text(name, measures.get(name)) for measures in columns.values()]
            table.add_row(name.replace("_", " "), *row)
    return table


def _subjects(scored: Scored) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("subject", "questions", "accuracy", "confidence", "ece"):
        table.add_column(name, justify="left" if name == "subject" else "right")
    for s in scored.subjects:
        table.add_row(
            s.name, f"{s.n:,}", f"{s.accuracy:.1%}", f"{s.confidence:.1%}", f"{s.ece:.3f}"
        )
    return table


def text(name: str, measure: Measure | None) -> str:
    """A measure as .123 [.101, .150], shares in per cent."""
    if measure is None:
        return ""
    if measure.value is None or math.isnan(measure.value):
        return "undefined"

    def number(value: float) -> str:
        return f"{value:.1%}" if name in PERCENT else f"{value:.4f}"

    if measure.low is None or measure.high is None:
        return number(measure.value)
    return f"{number(measure.value)} [{number(measure.low)}, {number(measure.high)}]"
