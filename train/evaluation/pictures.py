"""A result as pictures: reliability diagrams, and risk–coverage curves."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsce import calibration
from train import files
from train.evaluation.results import Bin, Result, Scored
from train.evaluation.table import WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

RELIABILITY = "reliability.png"
RISK_COVERAGE = "risk-coverage.png"


def write(out: Path, result: Result) -> None:
    """Writes both pictures into the folder, each atomically; without matplotlib, says so."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.info('no pictures: pip install matplotlib, or ".[plot]"')
        return
    for name, figure in (
        (RELIABILITY, reliability(result)),
        (RISK_COVERAGE, risk_coverage(result)),
    ):
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        files.write(out / name, content.getvalue())


def panels(result: Result) -> dict[str, tuple[list[Bin], Scored]]:
    """What is drawn side by side: each task's reported scoring, with a temperature, and tokens."""
    found = {}
    for task in result.tasks.values():
        scored = task.scorings[task.reported]
        found[f"{task.task}, {WORDS[task.reported]}"] = scored.bins, scored
        if scored.temperature is not None:
            title = f"{task.task}, T = {scored.temperature.value:.4g}"
            found[title] = scored.temperature.bins, scored
    if result.tokens is not None:
        found["next token"] = result.tokens.bins, result.tokens
    return found


def reliability(result: Result) -> Figure:
    """Reliability diagrams side by side."""
    from matplotlib.figure import Figure

    drawn = panels(result)
    figure = Figure(figsize=(5.2 * len(drawn), 6.2), layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for ax, (title, (bins, _)) in zip(axes, drawn.items(), strict=True):
        calibration.reliability_diagram(*_samples(bins), bins=len(bins), title=title, ax=ax)
    return figure


def risk_coverage(result: Result) -> Figure:
    """Errors among the surest answers, against the share of questions that is answered."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    scored = {t.task: t.scorings[t.reported] for t in result.tasks.values()}
    if result.tokens is not None:
        scored["next token"] = result.tokens
    figure = Figure(figsize=(5.2 * len(scored), 4.2), layout="constrained")
    axes = figure.subplots(1, len(scored), squeeze=False)[0]
    for ax, (title, of) in zip(axes, scored.items(), strict=True):
        _draw_curve(ax, title, of)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    return figure


def _draw_curve(ax: Axes, title: str, scored: Scored) -> None:
    curve, overall = scored.risk_coverage, scored.risk_coverage.risk[-1]
    aurc, auroc = (scored.measures[name].value for name in ("aurc", "auroc"))
    ax.plot(curve.coverage, curve.risk, color="#4c78a8", linewidth=1.8, label="surest first")
    ax.axhline(overall, color="#333333", linestyle="--", linewidth=1, label="in any order")
    numbers = [f"AURC {aurc:.4f}"] + ([] if auroc is None else [f"AUROC {auroc:.4f}"])
    ax.set_title(f"{title}\n{'   '.join(numbers)}   n {scored.n:,}", loc="left", fontsize="medium")
    ax.set(xlim=(0, 1), ylim=(0, max(1.1 * max(curve.risk), 0.05)))
    ax.set(xlabel="questions answered", ylabel="errors among them")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="best", fontsize="small", frameon=False)


def _samples(bins: list[Bin]) -> tuple[np.ndarray, np.ndarray]:
    """Samples that have these bins: the diagram draws no more than counts and means."""
    inside = [np.clip(b.confidence, b.low + 1e-6, b.high - 1e-6) for b in bins]
    confidence = np.repeat(inside, [b.count for b in bins])
    correct = [np.arange(b.count) < round(b.accuracy * b.count) for b in bins]
    return confidence.astype(np.float32), np.concatenate(correct)
