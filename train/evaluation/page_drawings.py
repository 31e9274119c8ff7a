"""Pictures of a report as SVG that lies in the page: text and axes take the page's own colour."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsce.calibration import wilson_interval
from train.evaluation.comparison import COLORS
from train.evaluation.results import Bin, Curve, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
INSIDE = 4
"""Lines of a legend that have room among what is drawn; one of more stands below."""
LEGEND_WIDTH = 36
"""Characters that have room in one of them."""
_number = itertools.count()

Line = Sequence[tuple[float, float]]


def reliability(bins: Sequence[Bin]) -> str:
    """Accuracy with its 95 % interval against confidence, by bin, and the share of predictions."""
    seen = [b for b in bins if b.count]
    n = sum(b.count for b in seen)

    def draw(figure: Figure) -> None:
        ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        ax.plot((0, 1), (0, 1), color=INK, lw=1, ls=(0, (4, 3)))
        for b in seen:
            gap = b.confidence - b.accuracy
            x, width = (b.low + b.high) / 2, b.high - b.low
            least = min(b.accuracy, b.confidence)
            ax.bar(x, least, width, color=COLORS[0], alpha=0.75)
            color = COLORS[1] if gap > 0 else COLORS[2]
            ax.bar(x, abs(gap), width, bottom=least, color=color, alpha=0.45)
            low, high = wilson_interval(min(b.accuracy * b.count, b.count), b.count)
            ax.plot((b.confidence, b.confidence), (float(low), float(high)), color=INK, lw=1)
            ax.plot(b.confidence, b.accuracy, "o", ms=3, color=INK)
            below.bar(x, b.count / n, width, color="0.6")
        ax.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        below.set(xlabel="confidence", ylabel="share")

    return _svg(draw, (3.4, 3.9))


def lines(
    drawn: Mapping[str, Line],
    x: str,
    y: str,
    *,
    log_y: bool = False,
    intervals: Mapping[str, Sequence[Measure]] | None = None,
    best: Line | None = None,
) -> str:
    """Lines by their names; with `intervals`, a bar at each point. `best` is a reference line."""

    labels = {name: textwrap.fill(re.sub(", ?", ", ", name), LEGEND_WIDTH) for name in drawn}
    rows = sum(len(label.splitlines()) for label in labels.values())
    below = rows if len(drawn) > 1 and rows > INSIDE else 0

    def draw(figure: Figure) -> None:
        ax: Axes = figure.subplots()
        for k, (name, points) in enumerate(drawn.items()):
            style: dict[str, Any] = {"color": COLORS[k % len(COLORS)]}
            style["ls"] = ("-", "--", ":")[k // len(COLORS) % 3]
            marker = "o" if intervals is not None or len(points) == 1 else None
            ax.plot(*np.array(points).T, label=labels[name], lw=1.5, marker=marker, ms=4, **style)
            for (at, _), m in zip(points, (intervals or {}).get(name, []), strict=False):
                if m.low is not None and m.high is not None:
                    ax.plot((at, at), (m.low, m.high), color=style["color"], lw=1.2)
        if best is not None:
            ax.plot(*np.array(best).T, color=INK, lw=1, ls=(0, (4, 3)))
        ax.set(xlabel=x, ylabel=y, **({"yscale": "log"} if log_y else {}))
        if not log_y:
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.grid(alpha=0.25)
        if below:
            figure.legend(fontsize=8, loc="outside lower left")
        elif len(drawn) > 1:
            ax.legend(fontsize=8)

    return _svg(draw, (3.6, 3.2 + 0.16 * below))


def risk_coverage(curves: Mapping[str, Curve]) -> str:
    """The share of errors among the surest predictions, against how many these are."""
    drawn = {name: list(zip(c.coverage, c.risk, strict=True)) for name, c in curves.items()}
    return lines(drawn, "coverage: share kept, the surest", "risk: errors in them")


def _svg(draw: Any, size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Names in one SVG must not be those of another in the same page.
    style: Any = STYLE | {"svg.hashsalt": f"drawing {next(_number)}"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for ax in figure.axes:
            ax.patch.set_alpha(0)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: ([^;"]*?)px [^;"]*', r"font-size: \1px", svg)
    # Coordinates, which stand in tags; numbers between tags are text.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
