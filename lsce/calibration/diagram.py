"""The reliability diagram: accuracy against confidence, as a picture."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from lsce.calibration.intervals import wilson_interval
from lsce.calibration.state import CalibrationResult, CalibrationState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVEL = 0.95
ACCURACY, GAP, INK = "#4c78a8", "#e45756", "#333333"


def reliability_diagram(
    confidence: Float[ArrayLike, "*samples"] | CalibrationState,
    correct: Real[ArrayLike, "*samples"] | None = None,
    *,
    bins: int = 15,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws accuracy against confidence over even bins, and the histogram of confidences below.

    A bar is a bin's accuracy with its 95 % Wilson interval; what is shaded between the bar and the
    bin's mean confidence is the gap that ECE averages; on the dashed diagonal the two agree. Below,
    each bin's share of the samples, with accuracy and mean confidence marked.

    Args:
      confidence: probabilities of the predicted classes, in any shape; or a `CalibrationState`,
        whose bins are then drawn.
      correct: whether each prediction was right, in the same shape; left out with a state.
      bins: number of even bins.
      title: written above.
      path: file to save to; its ending names the format (png, pdf, svg).
      ax: matplotlib axes to draw into, for figures of several diagrams; needs room below for the
        histogram (a figure with `layout="constrained"` makes it). By default a new figure.

    Returns:
      The figure, which no global state of pyplot knows of.

    Raises ImportError without matplotlib (`pip install "lsce[plot]"`), ValueError as
    `CalibrationState.update` does. No samples are no error: the diagram then says so.

    Source: DeGroot and Fienberg, 1983; Guo et al., 2017, https://arxiv.org/abs/1706.04599.
    """
    if isinstance(confidence, CalibrationState):
        if correct is not None:
            raise TypeError("correct must be left out when a CalibrationState is given")
        state = confidence
    elif correct is None:
        raise TypeError("correct is missing; only with a CalibrationState may it be left out")
    else:
        state = CalibrationState.create(bins).update(confidence, correct)
    result = jax.device_get(state.compute())

    if ax is None:
        figure = _new_figure()
        ax = figure.add_subplot()
    else:
        figure = ax.get_figure(root=True)
        if figure is None:
            raise ValueError("ax has been removed from its figure")
    histogram = ax.inset_axes((0, -0.32, 1, 0.26), sharex=ax)
    _draw_accuracy(ax, result)
    _draw_histogram(histogram, result)
    if title:
        ax.set_title(title, color=INK)
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'reliability_diagram needs matplotlib: pip install "lsce[plot]", or matplotlib itself'
        ) from error
    return Figure(figsize=(4.8, 6.0), layout="constrained")


def _draw_accuracy(ax: Axes, result: CalibrationResult) -> None:
    bins = len(result.bin_count)
    width = 1 / bins
    seen = result.bin_count > 0
    centre = (np.flatnonzero(seen) + 0.5) * width
    count, accuracy, confidence = (
        field[seen] for field in (result.bin_count, result.bin_accuracy, result.bin_confidence)
    )
    low, high = wilson_interval(accuracy * count, count, LEVEL)

    ax.bar(
        centre, accuracy, width, color=ACCURACY, edgecolor="white", linewidth=0.6, label="accuracy"
    )
    ax.bar(
        centre,
        confidence - accuracy,
        width,
        bottom=accuracy,
        color=(GAP, 0.25),
        edgecolor=GAP,
        linewidth=0.8,
        label="gap to mean confidence",
    )
    ax.errorbar(
        centre,
        accuracy,
        yerr=(accuracy - low, high - accuracy),
        fmt="none",
        ecolor=INK,
        elinewidth=1,
        capsize=min(3.0, 30 * width),
        label=f"{LEVEL:.0%} interval",
    )
    ax.plot(
        (0, 1), (0, 1), color=INK, linestyle=(0, (4, 3)), linewidth=1, label="perfect calibration"
    )
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", ylabel="accuracy")
    ax.tick_params(labelbottom=False)
    ax.legend(loc="upper left", fontsize="small", framealpha=0.9)
    ax.text(
        0.97,
        0.03,
        _summary(result),
        transform=ax.transAxes,
        ha="right",
        va="bottom",
        fontsize="small",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "0.8", "alpha": 0.9, "boxstyle": "round,pad=0.4"},
    )


def _draw_histogram(ax: Axes, result: CalibrationResult) -> None:
    bins = len(result.bin_count)
    share = result.bin_count / max(1, int(result.count))
    ax.bar(
        (np.arange(bins) + 0.5) / bins,
        share,
        1 / bins,
        color="0.75",
        edgecolor="white",
        linewidth=0.6,
    )
    if not math.isnan(result.accuracy):
        ax.axvline(float(result.accuracy), color=ACCURACY, linewidth=1.5, label="accuracy")
        ax.axvline(
            float(result.confidence),
            color=GAP,
            linewidth=1.5,
            linestyle="--",
            label="mean confidence",
        )
        ax.legend(loc="upper left", fontsize="small", framealpha=0.9)
    ax.set(ylim=(0, max(1.1 * share.max(), 0.05)), xlabel="confidence", ylabel="share")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")


def _summary(result: CalibrationResult) -> str:
    if int(result.count) == 0:
        return "no samples"
    return "\n".join(
        [
            f"ECE  {float(result.ece):.4f}",
            f"accuracy  {float(result.accuracy):.4f}",
            f"confidence  {float(result.confidence):.4f}",
            f"n  {int(result.count):,}",
        ]
    )
