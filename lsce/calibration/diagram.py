"""The reliability diagram: accuracy against confidence, as a picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

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
ACCURACY, OVER, UNDER, INK = "#4c78a8", "#e45756", "#2a9d8f", "#333333"


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

    A dot stands at a bin's mean confidence and accuracy, with the 95 % Wilson interval of the
    accuracy; on the dashed diagonal the two agree. What is shaded of the bin's bar lies between
    them: the gap that ECE averages, in one colour where the model is over-confident and in another
    where it is under-confident. Below, each bin's share of the samples, with the overall
    accuracy and mean confidence marked.

    Args:
      confidence: probabilities of the predicted classes, in any shape; or a `CalibrationState`,
        whose bins are then drawn.
      correct: whether each prediction was right, in the same shape; left out with a state.
      bins: number of even bins.
      title: written above.
      path: file to save to; its ending names the format (png, pdf, svg).
      ax: matplotlib axes to draw into, for figures of several diagrams; its place in the figure's
        grid is shared with the histogram. By default a new figure.

    Returns:
      The figure, which no global state of pyplot knows of.

    Raises ImportError without matplotlib (`pip install "lsce[plot]"`), ValueError as
    `CalibrationState.update` does and for a path that names no file. No samples are no error: the
    diagram then says so.

    Source: DeGroot and Fienberg, 1983; Guo et al., 2017, https://arxiv.org/abs/1706.04599.
    """
    if path is not None and (not os.fspath(path) or os.path.isdir(path)):
        raise ValueError(f"path={os.fspath(path)!r} must name a file")
    if isinstance(confidence, CalibrationState):
        if correct is not None:
            raise TypeError("correct must be left out when a CalibrationState is given")
        state = confidence
    elif correct is None:
        raise TypeError("correct is missing; only with a CalibrationState may it be left out")
    else:
        state = CalibrationState.create(bins).update(confidence, correct)
    result = jax.device_get(state.compute())

    figure, ax, histogram = _panels(_new_figure().add_subplot() if ax is None else ax)
    _draw_accuracy(ax, result)
    _draw_histogram(histogram, result)
    ax.annotate(
        _summary(result),
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize="small",
        color=INK,
    )
    if title:
        ax.set_title(title, loc="left", pad=22, color=INK)
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
    return Figure(figsize=(4.8, 6.2), layout="constrained")


def _panels(ax: Axes) -> tuple[Figure, Axes, Axes]:
    """Splits the place of `ax` in its figure in two: `ax` itself above, new axes below."""
    figure, place = ax.get_figure(root=True), ax.get_subplotspec()
    if figure is None or place is None:
        raise ValueError("ax must be part of a figure's grid (from Figure.subplots or add_subplot)")
    above, below = place.subgridspec(2, 1, height_ratios=(4, 1))
    ax.set_subplotspec(above)
    return figure, ax, figure.add_subplot(below, sharex=ax)


def _draw_accuracy(ax: Axes, result: CalibrationResult) -> None:
    width = 1 / len(result.bin_count)
    seen = np.flatnonzero(result.bin_count)
    centre = (seen + 0.5) * width
    count, accuracy, confidence = (
        field[seen] for field in (result.bin_count, result.bin_accuracy, result.bin_confidence)
    )
    low, high = wilson_interval(accuracy * count, count, LEVEL)
    gap = confidence - accuracy

    ax.plot((0, 1), (0, 1), color=INK, linestyle=(0, (4, 3)), linewidth=1, label="calibrated")
    bars = {"width": width, "edgecolor": "white", "linewidth": 0.6}
    if seen.size:
        ax.bar(centre, np.minimum(accuracy, confidence), color=ACCURACY, label="accuracy", **bars)
    for side, color, label in (
        (gap > 0, OVER, "over-confident"),
        (gap < 0, UNDER, "under-confident"),
    ):
        if side.any():
            ax.bar(
                centre[side],
                np.abs(gap)[side],
                bottom=np.minimum(accuracy, confidence)[side],
                color=color,
                alpha=0.45,
                label=f"gap, {label}",
                **bars,
            )
    if seen.size:
        ax.errorbar(
            confidence,
            accuracy,
            yerr=(accuracy - low, high - accuracy),
            fmt="o",
            markersize=3,
            color=INK,
            elinewidth=1,
            capsize=2.5,
            clip_on=False,
            label=f"accuracy, {LEVEL:.0%} interval",
        )
    ax.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    ax.tick_params(labelbottom=False)
    # Bars reach into the upper left only where a model is under-confident and unsure.
    unsure = result.confidence < min(result.accuracy, 0.5)
    place = "lower right" if unsure else "upper left"
    ax.legend(loc=place, fontsize="x-small", framealpha=0.95)


def _draw_histogram(ax: Axes, result: CalibrationResult) -> None:
    bins = len(result.bin_count)
    share = result.bin_count / max(1, int(result.count))
    ax.bar((np.arange(bins) + 0.5) / bins, share, 1 / bins, color="0.75", edgecolor="white")
    if not np.isnan(result.accuracy):
        for value, style, color, label in (
            (result.accuracy, "-", ACCURACY, "accuracy"),
            (result.confidence, "--", OVER, "mean confidence"),
        ):
            ax.axvline(float(value), color=color, linewidth=1.5, linestyle=style, label=label)
        place = _emptier_corner(np.asarray(share), (result.accuracy, result.confidence))
        ax.legend(loc=place, fontsize="x-small", framealpha=0.95)
    ax.set(ylim=(0, max(1.1 * share.max(), 0.05)), xlabel="confidence", ylabel="share")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")


def _emptier_corner(
    share: np.ndarray, lines: tuple[ArrayLike, ...]
) -> Literal["upper left", "upper right"]:
    """The upper corner, a third of the width, with fewer tall bars and lines.

    matplotlib's own search for a legend's place warns where it takes a second.
    """
    tall = (np.flatnonzero(share > 0.6 * share.max()) + 0.5) / len(share)
    there = np.concatenate([tall, np.asarray(lines)])
    return "upper left" if (there < 1 / 3).sum() < (there > 2 / 3).sum() else "upper right"


def _summary(result: CalibrationResult) -> str:
    if result.invalid > 0:
        return f"{int(result.invalid):,} invalid samples, n {int(result.count):,}"
    if result.count == 0:
        return "no samples"
    return (
        f"ECE {float(result.ece):.4f}   accuracy {float(result.accuracy):.4f}   "
        f"confidence {float(result.confidence):.4f}   n {int(result.count):,}"
    )
