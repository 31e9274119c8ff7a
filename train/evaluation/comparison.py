"""Runs side by side: how smoothing changes accuracy and calibration, as a table and a picture.

The layout is that of the paper this project follows, "Calibrated Language Models and How to Find
Them with Label Smoothing" (Huang, Lu & Zeng 2025, https://arxiv.org/abs/2508.00264): accuracy, ECE
and RMS by β as in its Table 1; ECE and accuracy against the learning rate, with and without
smoothing, as in its Figure 2.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Line = tuple[tuple[str, Any], ...]
    """The settings that the points of one line share."""

NAMES = {"label_smoothing": "β", "learning_rate": "learning rate"}
COLUMNS: dict[str, tuple[str, str, Callable[..., float]]] = {
    "accuracy": ("accuracy", "{:.1%}", max),
    "ECE": ("ece", "{:.4f}", min),
    "RMS": ("rms", "{:.4f}", min),
}
"""By what is printed above it: the field of `evaluate.Scores`, its format, which value is best."""
INK = "#333333"
COLORS = ("#4c78a8", "#e45756", "#2a9d8f", "#f2a03d", "#b279a2", "#8c6d31")
LEAST_SPAN = 0.05
"""The least range of accuracies that an axis shows."""
STYLES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run of a sweep."""

    name: str
    settings: dict[str, Any]
    """The values of the fields that the sweep varies."""
    evaluation: dict[str, Any]
    """What its `eval.json` holds."""

    def scores(self) -> dict[str, dict[str, Any]]:
        """The scores of the questions and of the tokens, in this order, where there are any."""
        choices = self.evaluation["choices"]
        found = {
            "questions": choices[choices["reported"]],
            "tokens": self.evaluation["tokens"],
        }
        return {what: scores for what, scores in found.items() if scores is not None}


def scored_by_all(results: Sequence[Result]) -> list[str]:
    """What every run has scores of: "questions", "tokens"."""
    return [what for what in results[0].scores() if all(what in r.scores() for r in results)]


def print_table(results: Sequence[Result], console: Console) -> None:
    """Prints a row a run, β varying fastest, and each column's best value in bold."""
    header, rows, best = table(results)
    title = "Accuracy and calibration on held-out data"
    shown = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    groups = set[str]()
    for group, name in header:
        above = "" if group in groups else group
        heading = f"{above}\n{name}" if group else name.replace(" ", "\n", 1)
        shown.add_column(heading, justify="right", vertical="bottom")
        groups.add(group)
    for r, row in enumerate(rows):
        cells = [f"[bold]{cell}[/]" if (r, c) in best else cell for c, cell in enumerate(row)]
        shown.add_row(*cells)
    console.print(shown)


def table(
    results: Sequence[Result],
) -> tuple[list[tuple[str, str]], list[list[str]], set[tuple[int, int]]]:
    """The comparison as text.

    Returns:
      Pairs of a group ("questions", "tokens" or none) and a name, one for each column; the cells,
      row by row; and the (row, column) of the best value of each measured column.
    """
    fields = sorted(results[0].settings, key=lambda field: field == "label_smoothing")
    ordered = sorted(results, key=lambda result: [sort_key(result.settings[f]) for f in fields])
    fields.sort(key=lambda field: field != "label_smoothing")
    header = [("", name_of(field)) for field in fields]
    rows = [[text(result.settings[field]) for field in fields] for result in ordered]
    best = set()
    for group in scored_by_all(results):
        for name, (field, form, better) in COLUMNS.items():
            values = [result.scores()[group][field] for result in ordered]
            best |= {(r, len(header)) for r, v in enumerate(values) if v == better(values)}
            header.append((group, name))
            for row, value in zip(rows, values, strict=True):
                row.append(form.format(value))
    return header, rows, best


def figure(results: Sequence[Result]) -> Figure:
    """Accuracy and ECE against the learning rate, a line for each β, and the table below.

    Where the learning rate is not varied, another field takes its place: the first varied one with
    numbers other than β and the seed, or else β. Runs that differ only in their seed are one point,
    their mean, with a bar from the least to the greatest.
    """
    from matplotlib.figure import Figure

    header, rows, best = table(results)
    groups = scored_by_all(results)
    heights = (2.6, 2.6, 0.5 + 0.24 * (len(rows) + 2))
    width = max(1, len(groups))
    drawn = Figure(figsize=(4.6 * width + 0.6, sum(heights)), layout="constrained")
    grid = drawn.add_gridspec(3, width, height_ratios=heights)
    x = x_field(results)
    axes = []
    for column, group in enumerate(groups):
        for row, name in enumerate(("accuracy", "ECE")):
            ax = drawn.add_subplot(grid[row, column])
            draw_lines(ax, results, x, group, COLUMNS[name][0])
            ax.set_ylabel(name if column == 0 else "")
            if row == 0:
                counts = sorted({result.scores()[group]["n"] for result in results})
                n = " to ".join(f"{count:,}" for count in (counts[0], *counts[1:][-1:]))
                ax.set_title(f"Held-out {group}, n = {n}", loc="left", color=INK, fontsize="medium")
            else:
                ax.set_xlabel(name_of(x))
            axes.append(ax)
    handles, labels = axes[0].get_legend_handles_labels() if axes else ([], [])
    if any(labels):
        # A letter takes about 0.075 inches, the line before it and the gap 0.6.
        fitting = int(drawn.get_figwidth() / (0.075 * max(map(len, labels)) + 0.6))
        columns = min(max(fitting, 1), 4)
        lines = math.ceil(len(labels) / columns)
        drawn.set_figheight(drawn.get_figheight() + 0.2 * (lines - 1))
        drawn.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=columns,
            frameon=False,
            fontsize="small",
        )
    draw_table(drawn.add_subplot(grid[2, :]), header, rows, best)
    return drawn


def x_field(results: Sequence[Result]) -> str:
    """The field along the horizontal axis."""
    settings = results[0].settings
    others = [field for field in settings if field not in ("label_smoothing", "seed")]
    for field in sorted(others, key=lambda field: field != "learning_rate"):
        if all(is_number(result.settings[field]) for result in results):
            return field
    return "label_smoothing" if "label_smoothing" in settings else next(iter(settings))


def draw_lines(ax: Axes, results: Sequence[Result], x: str, group: str, field: str) -> None:
    """One score against `x`, a line for each combination of the other settings but the seed."""
    lines: dict[Line, dict[Any, list[float]]] = {}
    for result in results:
        key = tuple((k, v) for k, v in result.settings.items() if k not in (x, "seed"))
        points = lines.setdefault(key, {})
        points.setdefault(result.settings[x], []).append(result.scores()[group][field])

    from matplotlib.ticker import PercentFormatter

    ticks = sorted({result.settings[x] for result in results}, key=sort_key)
    numeric = all(map(is_number, ticks))
    log = numeric and min(ticks) > 0 and max(ticks) > 4 * min(ticks)
    numeric = numeric and apart(ticks, log)
    place = {tick: tick if numeric else i for i, tick in enumerate(ticks)}
    betas = sorted({dict(line).get("label_smoothing", 0.0) for line in lines})
    rest = sorted({unsmoothed(line) for line in lines}, key=repr)
    for line, points in sorted(lines.items(), key=lambda item: repr(item[0])):
        where = sorted(points, key=sort_key)
        means = [math.fsum(points[v]) / len(points[v]) for v in where]
        beta = dict(line).get("label_smoothing", 0.0)
        style: dict[str, Any] = {
            "color": COLORS[betas.index(beta) % len(COLORS)],
            "linestyle": STYLES[rest.index(unsmoothed(line)) % len(STYLES)],
        }
        at = [place[v] for v in where]
        label = ", ".join(f"{name_of(k)} = {text(v)}" for k, v in line)
        ax.plot(at, means, marker="o", markersize=5, linewidth=1.8, label=label, **style)
        if any(len(points[v]) > 1 for v in where):
            low, high = [min(points[v]) for v in where], [max(points[v]) for v in where]
            ax.vlines(at, low, high, color=style["color"], linewidth=1.2)
    if numeric and log:
        ax.set_xscale("log")
    crowded = len(ticks) * max(len(text(tick)) for tick in ticks) > 40
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if crowded else {}
    ax.set_xticks([place[tick] for tick in ticks], [text(tick) for tick in ticks], **turned)
    ax.minorticks_off()
    if field == "accuracy":
        # Wide enough that the luck of a few predictions does not look like an effect.
        low, high = ax.get_ylim()
        middle, half = (low + high) / 2, max(high - low, LEAST_SPAN) / 2
        ax.set_ylim(middle - half, middle + half)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        ax.set_ylim(0, 1.12 * max(result.scores()[group][field] for result in results))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def apart(ticks: Sequence[float], log: bool) -> bool:
    """Whether all labels have room where their values are; otherwise values stand evenly."""
    at = [math.log(tick) if log else float(tick) for tick in ticks]
    width = (max(len(text(tick)) for tick in ticks) + 1) / 45  # of the axis, where 45 letters fit
    gaps = [b - a for a, b in itertools.pairwise(at)]
    return all(gap >= width * (at[-1] - at[0]) for gap in gaps)


def unsmoothed(line: Line) -> Line:
    """The settings of a line other than β."""
    return tuple(setting for setting in line if setting[0] != "label_smoothing")


def draw_table(
    ax: Axes, header: list[tuple[str, str]], rows: list[list[str]], best: set[tuple[int, int]]
) -> None:
    """The table, with rules above and below as in print."""
    ax.set_axis_off()
    columns = len(header)
    ax.set(xlim=(0, columns), ylim=(len(rows) + 2, 0))
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "fontsize": "small"}
    for c, (_, name) in enumerate(header):
        ax.text(c + 0.5, 1.5, name, **style)
    for group in dict.fromkeys(group for group, _ in header if group):
        of_group = [c for c, (g, _) in enumerate(header) if g == group]
        left, right = of_group[0] + 0.1, of_group[-1] + 0.9
        ax.text((left + right) / 2, 0.5, f"held-out {group}", **style)
        ax.plot((left, right), (1, 1), color=INK, linewidth=0.6)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            weight = "bold" if (r, c) in best else "normal"
            ax.text(c + 0.5, r + 2.5, cell, weight=weight, **style)
    for y, width in ((0, 1.2), (2, 0.6), (len(rows) + 2, 1.2)):
        ax.plot((0, columns), (y, y), color=INK, linewidth=width, clip_on=False)


def save(results: Sequence[Result], path: Path) -> None:
    figure(results).savefig(path, dpi=150)


def name_of(field: str) -> str:
    return NAMES.get(field, field.replace("_", " "))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then everything else by name."""
    return (False, value, "") if is_number(value) else (True, 0.0, str(value))


def text(value: Any) -> str:
    """A setting as people write it: 0.003, linear, off."""
    if value is None:
        return "off"
    return f"{value:.12g}" if isinstance(value, float) else str(value)
