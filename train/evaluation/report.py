"""An evaluation for people and for programs: a table, `eval.json`, `reliability.png`."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import rich.console
from rich import box
from rich.table import Table

from lsce.calibration import reliability_diagram
from train import files
from train.evaluation.measures import BINS, bins
from train.evaluation.scoring import REPORTED, Evaluation, Scores, Scoring
from train.run.folder import EVALUATION, RELIABILITY
from train.run.progress import Console
from train.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = {
    "predictions": ("n", "{:,}"),
    "NLL (nats)": ("nll", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "mean confidence": ("mean_confidence", "{:.2%}"),
    "ECE": ("ece", "{:.4f}"),
    "RMS": ("rms", "{:.4f}"),
    "Brier": ("brier", "{:.4f}"),
}
SCORINGS: dict[Scoring, str] = {"per_token": "per token", "sum": "summed"}
"""How the log-likelihood of an option is read, in words."""


def print_table(evaluation: Evaluation, console: rich.console.Console | None = None) -> None:
    """Prints the scores, a column for the tokens and one for each scoring of the questions."""
    console = console or Console()
    if evaluation.tokens is None and not evaluation.choices:
        console.print("Nothing was held out, so there is nothing to evaluate.", highlight=False)
        return
    columns: dict[str, Scores] = {}
    if evaluation.tokens:
        columns["tokens\n"] = evaluation.tokens
    for scoring, words in SCORINGS.items():
        if scoring in evaluation.choices:
            columns[f"questions\n{words}"] = evaluation.choices[scoring]
    table = Table(
        title="Held-out evaluation",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, (field, form) in ROWS.items():
        table.add_row(label, *(form.format(getattr(s, field)) for s in columns.values()))
    console.print(table)
    console.print(caption(evaluation), highlight=False)


def caption(evaluation: Evaluation) -> str:
    """What a reader of the table must know to read it."""
    notes = [f"ECE over {BINS} even bins, RMS over bins of 100 predictions."]
    if evaluation.chance:
        notes.append(
            "An option is scored by the log-likelihood of its text, per token (reported) or summed;"
            f" guessing is right {evaluation.chance:.0%} of the time."
        )
    else:
        notes.append("The held-out records give no multiple-choice questions.")
    if evaluation.left_out:
        many = "questions are" if evaluation.left_out > 1 else "question is"
        notes.append(f"{evaluation.left_out} {many} left out, too long for a row.")
    return "\n".join(notes)


def write(out: Path, evaluation: Evaluation, flags: Mapping[str, Any], *, step: int) -> None:
    """Writes `reliability.png` and then `eval.json` into the folder `out`, each atomically.

    `flags` are the run's, by name; `step` is the optimizer step of the evaluated weights. A run
    whose folder holds `eval.json` is done.
    """
    out.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    reliability_figure(evaluation).savefig(picture, format="png", dpi=150)
    files.write(out / RELIABILITY, picture.getvalue())
    files.write_json(out / EVALUATION, as_json(evaluation, flags, step=step))


def as_json(evaluation: Evaluation, flags: Mapping[str, Any], *, step: int) -> dict[str, Any]:
    """The content of `eval.json`.

    `tokens`, `choices.sum` and `choices.per_token` hold the fields of `evaluate.Scores` and the
    bins of the reliability diagram, or null where there was nothing to score; `choices.reported`
    says which of the two scorings tables and pictures show.
    """

    def scored(scores: Scores | None) -> dict[str, Any] | None:
        if scores is None:
            return None
        found = bins(scores.confidence, scores.correct)
        return {**scores.summary(), "bins": [dataclasses.asdict(b) for b in found]}

    return {
        "format": 1,
        "step": step,
        "tokens": scored(evaluation.tokens),
        "choices": {
            "reported": REPORTED,
            "chance": evaluation.chance,
            "left_out": evaluation.left_out,
            **{scoring: scored(evaluation.choices.get(scoring)) for scoring in SCORINGS},
        },
        "config": files.plain(dict(flags)),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }


def reliability_figure(evaluation: Evaluation) -> Figure:
    """Reliability diagrams side by side: of the tokens, and of the questions if there are any."""
    from matplotlib.figure import Figure

    panels: dict[str, Scores] = {}
    if evaluation.tokens:
        panels["Next token"] = evaluation.tokens
    if evaluation.choices:
        panels["Multiple choice"] = evaluation.choices[REPORTED]
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 6.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for ax, (title, scores) in zip(axes, panels.items(), strict=False):
        reliability_diagram(scores.confidence, scores.correct, bins=BINS, title=title, ax=ax)
    if not panels:
        axes[0].text(0.5, 0.5, "no held-out records", ha="center")
        axes[0].set_axis_off()
    return figure
