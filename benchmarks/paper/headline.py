"""The few numbers of an experiment that a README has room for, as a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from train.evaluation import page
from train.evaluation.page_entries import TEMPERATURE, TOKENS, Entry

OF_TOKENS = ("accuracy", "ece", "nll")
LEGEND = (
    "Means over seeds. Less β 0, less before: each seed less its own without smoothing, and less"
    " the model before fine-tuning, on the same questions; the mean (least to greatest; seeds whose"
    " 95 % interval over questions excludes 0), or of one seed that interval."
)


def table(entries: Sequence[Entry]) -> str:
    """A line for each task and measure: the models before, after fine-tuning at each β, at β = 0
    with a fitted temperature, each smoothed one less the one at β = 0 of its seed, and that one
    less the model before; first those of the held-out tokens, of a run's own evaluation.

    Of several seeds it is the mean, of differences with the range, and how many are more than
    chance by their own 95 % intervals over questions. Empty where no task was asked.
    """
    asked = [
        task for task in page.tasks(entries) if any(_curve(e, task) is not None for e in entries)
    ]
    arms = [g for g in page.groups(entries) if any(_curve(g.first, task) for task in asked)]
    if not arms:
        return ""
    heads = ["", ""]
    for arm in arms:
        heads.append(arm.name)
        if arm.first.beta is not None:
            heads += ["less β 0"] if arm.first.beta else ["less before", "β 0, T fitted"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for name in OF_TOKENS:
        if any(arm.measure(TOKENS, name) for arm in arms):
            cells = [cell for arm in arms for cell in _token_cells(arm, arms, name)]
            lines.append([TOKENS, page.SHORT.get(name, name), *cells])
    for task in asked:
        for name in page.COMPARED:
            cells = [cell for arm in arms for cell in _cells(arm, task, name)]
            lines.append([task, page.SHORT.get(name, name), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{LEGEND}\n"


def _curve(entry: Entry, task: str) -> object:
    return entry.blocks[task].curve if task in entry.blocks and entry.blocks[task].data else None


def _cells(arm: page.Group, task: str, name: str) -> Iterator[str]:
    yield page.shown(arm.measure(task, name), name)
    if arm.first.beta is not None:
        yield _apart(arm, task, name)
    if arm.first.beta == 0:
        yield page.shown(arm.measure(task + TEMPERATURE, name), name)


def _token_cells(arm: page.Group, arms: Sequence[page.Group], name: str) -> Iterator[str]:
    yield page.shown(arm.measure(TOKENS, name), name)
    if arm.first.beta == 0:
        yield from ("–", "–")  # not measured before, and temperatures are fitted on questions
    if arm.first.beta:
        plain = [entry for other in arms if other.first.beta == 0 for entry in other.entries]
        values = [
            ours - theirs
            for entry in arm.entries
            if (other := _without(entry, plain))
            if (ours := _value(entry, name)) is not None
            if (theirs := _value(other, name)) is not None
        ]
        yield f"{_mean(values)} ({_range(values)})" if values else "–"


def _without(smoothed: Entry, plain: Sequence[Entry]) -> Entry | None:
    """What `gather` compares it with at tasks: of its own seed, model and softcap the run at β = 0
    with the least NLL of held-out tokens."""
    alike = [
        entry
        for entry in plain
        if all(
            entry.settings.get(x) == smoothed.settings.get(x) for x in ("seed", "model", "softcap")
        )
    ]
    return min(alike, key=lambda entry: _value(entry, "nll") or math.inf, default=None)


def _value(entry: Entry, name: str) -> float | None:
    measure = entry.blocks[TOKENS].measures.get(name) if TOKENS in entry.blocks else None
    return measure and measure.value


def _apart(arm: page.Group, task: str, name: str) -> str:
    """+0.0123 (+0.0100 to +0.0150; 3 of 3), or of one seed +0.0123 [+0.0060, +0.0190]."""
    pairs = [e.blocks[task].against for e in arm.entries if task in e.blocks]
    found = [m for pair in pairs if pair and (m := pair[1].get(name)) and m.value is not None]
    values = [m.value for m in found if m.value is not None]
    if not values:
        return "–"
    if len(found) == 1 and (one := found[0]).low is not None and one.high is not None:
        return f"{page.signed(values[0])} [{page.signed(one.low)}, {page.signed(one.high)}]"
    sure = sum((m.low or 0) > 0 or (m.high or 0) < 0 for m in found)
    return f"{_mean(values)} ({_range(values)}; {sure} of {len(found)})"


def _mean(values: Sequence[float]) -> str:
    return page.signed(math.fsum(values) / len(values))


def _range(values: Sequence[float]) -> str:
    return f"{page.signed(min(values))} to {page.signed(max(values))}"
