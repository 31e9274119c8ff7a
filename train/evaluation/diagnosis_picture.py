"""A diagnosis as a picture: the bound, this model's tokens under it, temperatures and softcaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsce import theory
from train.evaluation.comparison import COLORS, INK
from train.evaluation.diagnosis import Diagnosis, Head, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN, *_ = COLORS


def figure(name: str, found: Diagnosis, points: dict[str, np.ndarray]) -> Figure:
    """The bound against V and D as in the paper's Figure 4; this model's tokens; T and softcaps."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.6, 7.4), layout="constrained")
    drawn.suptitle(f"{name}: how sure can it be, and how sure is it?", color=INK)
    scaled = "ttttcc" if found.softcaps else "tttttt"
    axes = drawn.subplot_mosaic(f"vvvvvvdddddd;nnnnnn{scaled}")
    _draw_bounds(axes["v"], axes["d"], found.head)
    _draw_tokens(axes["n"], found, points)
    _draw_temperatures(axes["t"], found)
    if found.softcaps:
        axes["c"].sharey(axes["t"])
        _draw_softcaps(axes["c"], found)
    for ax in axes.values():
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn


def _draw_bounds(by_v: Axes, by_d: Axes, head: Head) -> None:
    """With σ_C = 1 and ‖h‖ = √D, as an RMS norm leaves it: what V and D alone do."""
    sizes = np.unique(np.geomspace(2**8, 2**20, 60).astype(int))
    widths = np.geomspace(16, 8192, 60)
    for k, d in enumerate((64, 128, 256, 512)):
        bound = [float(theory.entropy_lower_bound(math.sqrt(d), int(v))) for v in sizes]
        by_v.plot(sizes, bound, color=BLUE, alpha=1 - 0.2 * k, label=f"D = {d}")
    for k, v in enumerate((256_000, 128_256, 32_768, 4_096)):
        bound = np.asarray(theory.entropy_lower_bound(np.sqrt(widths), v))
        by_d.plot(widths, bound, color=GREEN, alpha=1 - 0.2 * k, label=f"V = {v:,}")
    here = float(theory.entropy_lower_bound(math.sqrt(head.hidden_size), head.vocab_size))
    for ax, x, what in ((by_v, head.vocab_size, "V"), (by_d, head.hidden_size, "D")):
        ax.plot([x], [here], "o", color=RED, label="this model's V and D", zorder=3)
        ax.set(xscale="log", xlabel=what, ylabel="least entropy, nats")
        ax.legend(fontsize="x-small", frameon=False)
        ax.set_title(f"The bound against {what}, at σ_C = 1, ‖h‖ = √D", fontsize="medium")


def _draw_tokens(ax: Axes, found: Diagnosis, points: dict[str, np.ndarray]) -> None:
    v, length = found.head.vocab_size, points["length"]
    grid = np.geomspace(min(1.0, length.min()), 1.3 * length.max(), 200)
    ax.plot(grid, np.asarray(theory.entropy_lower_bound(grid, v)), color=INK, label="the bound")
    ax.plot(length, points["entropy"], ".", ms=3, color=BLUE, alpha=0.6, label="tokens")
    if found.head.capped:
        ax.axhline(found.head.capped.entropy, color=GREEN, ls="--", lw=1, label="softcap's bound")
    beta = found.label_smoothing
    ax.axhline(found.target.entropy, color=RED, ls=":", label=f"smoothed target, β = {beta:g}")
    ax.axhline(math.log(v), color="0.6", lw=0.8, label="log V")
    ax.set(xscale="log", xlabel="length of the centred logits", ylabel="entropy, nats")
    ax.set_title("This model on this text", fontsize="medium")
    _legend_below(ax)


def _draw_temperatures(ax: Axes, found: Diagnosis) -> None:
    tried = [v.temperature for v in found.temperatures]
    _draw_changes(ax, tried, found.temperatures, found)
    ax.axvline(found.temperature, color=GREEN, lw=1.2, label=f"best NLL: T = {found.temperature:g}")
    ax.set(xscale="log", xlabel="temperature")
    ax.set_xticks(tried, [f"{t:g}" for t in tried], fontsize="x-small")
    ax.minorticks_off()
    ax.set_title("What a temperature changes", fontsize="medium")
    _legend_below(ax)


def _draw_softcaps(ax: Axes, found: Diagnosis) -> None:
    """Beside no cap, side by side: their values are of very different sizes, and may be alike."""
    now = next(v for v in found.temperatures if v.temperature == 1)
    places = range(len(found.softcaps) + 1)
    _draw_changes(ax, places, (*found.softcaps, now), found)
    names = [f"{v.softcap:g}" for v in found.softcaps]
    ax.set_xticks(places, [*names, "none"], fontsize="x-small")
    ax.tick_params(labelleft=False)
    ax.set(xlabel="softcap")
    ax.set_title("or a softcap", fontsize="medium")


def _draw_changes(
    ax: Axes, places: Sequence[float], variants: Sequence[Variant], found: Diagnosis
) -> None:
    ax.plot(places, [v.ece for v in variants], "o-", color=BLUE, ms=4, label="ECE")
    gaps = [v.confidence - (found.accuracy.value or 0) for v in variants]
    ax.plot(places, gaps, "s--", color=RED, ms=4, label="confidence − accuracy")
    ax.axhline(0, color=INK, lw=0.8)


def _legend_below(ax: Axes) -> None:
    """Where there is room among the lines differs from model to model."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    ax.legend(fontsize="x-small", frameon=False, ncols=2, **place)
