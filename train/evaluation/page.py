"""A report of several models as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from train.evaluation import page_drawings
from train.evaluation.comparison import name_of, sort_key, text
from train.evaluation.measures import NAMES, SHIFTED
from train.evaluation.page_entries import TOKENS, Block, Entry, Unfinished, in_words
from train.evaluation.results import Measure
from train.run.metrics import HELD_OUT

COLUMNS = ("accuracy", "ece", "rms")
"""The measures of each task, as in Table 1 of the paper."""
COMPARED = ("accuracy", "ece", "auroc")
"""Those of which paired differences are told: a lower ECE is no gain where AUROC falls with it."""
BESIDE = ("confidence", "auroc", "aurc", "brier", "nll", "smooth_ece", "outside")
"""The other measures, in a table below."""
SHORT = {
    "ece": "ECE",
    "rms": "RMS",
    "auroc": "AUROC",
    "aurc": "AURC",
    "nll": "NLL",
    "smooth_ece": "smooth ECE",
}
FREE = ("seed", "eval_every", "checkpoint_every", "keep", "log_every", "samples", "wandb")
"""Flags in which runs may differ and be the same experiment."""
MOST_SENTENCES = 24


@dataclasses.dataclass(frozen=True)
class Group:
    """Entries that differ in their seed alone."""

    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        one, others = self.first.name, len(self.entries) - 1
        if not others:
            return one
        seed = f", seed {self.first.settings.get('seed')}"
        if one.endswith(seed):
            return f"{one.removesuffix(seed)}, {others + 1} seeds"
        return f"{one} and {others} other seed{'s' * (others > 1)}"

    @property
    def first(self) -> Entry:
        return self.entries[0]

    def measure(self, task: str, name: str) -> Measure | None:
        """One entry's with its interval; the mean of several, from the least to the greatest."""
        found = [e.blocks[task].measures.get(name) for e in self.entries if task in e.blocks]
        known = [m for m in found if m is not None and m.value is not None]
        if len(known) < 2:
            return known[0] if known else None
        values = [m.value for m in known if m.value is not None]
        return Measure(math.fsum(values) / len(values), min(values), max(values))


def groups(entries: Sequence[Entry]) -> list[Group]:
    """By their settings, β varying fastest; models without settings stand alone and first.

    Of one seed there is one entry in a group: another one is the same run at another step, or asked
    once more.
    """
    found: dict[tuple[Any, ...], list[Entry]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for entry in entries:
        rest = tuple(sorted((k, repr(v)) for k, v in entry.settings.items() if k not in FREE))
        key = rest or (entry.name,)
        seed = (*key, entry.settings.get("seed"))
        found.setdefault((seen[seed], *key), []).append(entry)
        seen[seed] += 1
    made = [Group(tuple(same)) for same in found.values()]
    fields = varied(entries)
    fields.sort(key=lambda field: field == "label_smoothing")
    return sorted(
        made,
        key=lambda g: (bool(g.first.settings), [sort_key(g.first.settings.get(f)) for f in fields]),
    )


def varied(entries: Sequence[Entry]) -> list[str]:
    """The flags in which trained entries differ, β first."""
    trained = [entry.settings for entry in entries if entry.settings]
    names = dict.fromkeys(itertools.chain.from_iterable(trained))
    found = [n for n in names if n not in FREE and len({repr(s.get(n)) for s in trained}) > 1]
    return sorted(found, key=lambda name: name != "label_smoothing")


def tasks(entries: Sequence[Entry]) -> list[str]:
    """Tokens first, which are most and say most."""
    found = dict.fromkeys(task for entry in entries for task in entry.blocks)
    return sorted(found, key=lambda task: task != TOKENS)


def render(
    entries: Sequence[Entry], unfinished: Sequence[Unfinished], title: str
) -> dict[str, str]:
    """The page and the Markdown, by the ending of their file."""
    made = groups(entries)
    what = tasks(entries)
    content = {
        "title": title,
        "groups": made,
        "unfinished": unfinished,
        "tasks": what,
        "columns": COLUMNS,
        "short": SHORT,
        "varied": varied(entries),
        "best": _best(made, what),
        "beside": [(task, _beside(made, task)) for task in what],
        "sentences": _few(list(sentences(made, what))),
        "meanings": {name: NAMES[name] for name in (*COLUMNS, *BESIDE) if name in NAMES},
        "several_seeds": any(len(group.entries) > 1 for group in made),
        "shifted": SHIFTED,
        "unlike": [
            task
            for task in what
            if len({e.blocks[task].data for e in entries if task in e.blocks} - {""}) > 1
        ],
        "chance": {
            task: next((e.blocks[task].chance for e in entries if task in e.blocks), None)
            for task in what
        },
        "versions": _versions(entries),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"name_of": name_of, "text": text}  # type: ignore[operator]
    environment.filters |= {"measure": shown, "interval": interval}
    markdown = environment.get_template("page.md").render(content)
    page = environment.get_template("page.html").render(content | {"pictures": _pictures(made)})
    return {"html": page, "md": markdown}


def shown(measure: Measure | None, name: str) -> str:
    """A share in percent for accuracy, four digits for the others."""
    if measure is None or measure.value is None:
        return "–"
    return f"{measure.value:.1%}" if name == "accuracy" else f"{measure.value:.4f}"


def interval(measure: Measure | None, name: str) -> str:
    if measure is None or measure.low is None or measure.high is None:
        return ""
    form = ".1%" if name == "accuracy" else ".4f"
    return f"[{measure.low:{form}}, {measure.high:{form}}]"


def sentences(made: Sequence[Group], what: Sequence[str]) -> Iterator[str]:
    """What the numbers say of each task, and whether chance may have said it: paired differences,
    or of β where there are none, which say less."""
    for task, group in itertools.product(what, made):
        compared = [e for e in group.entries if task in e.blocks and e.blocks[task].against]
        if len(compared) > 1:
            yield from _paired_by_seed(group, [e.blocks[task] for e in compared])
        elif compared:
            yield from _paired(compared[0], compared[0].blocks[task])
        elif plain := _without_smoothing(group, made, task):
            yield _of_smoothing(plain, group, task)


def _few(said: list[str]) -> list[str]:
    """Those that can be read; the tables have all."""
    left = len(said) - MOST_SENTENCES
    return said if left < 2 else [*said[:MOST_SENTENCES], f"{left} more are left out here."]


def _paired(entry: Entry, block: Block) -> Iterator[str]:
    assert block.against
    other, apart = block.against
    for name in COMPARED:
        m = apart.get(name)
        if m is None or m.value is None or m.low is None or m.high is None:
            continue
        sure = "more than chance" if m.low > 0 or m.high < 0 else "chance may explain it"
        yield (
            f"{block.task}: {entry.name} less {in_words(Path(other.model).name)} on the same"
            f" {other.n:,} questions, {SHORT.get(name, name)} {signed(m.value)}"
            f" [{signed(m.low)}, {signed(m.high)}]:"
            f" {sure}."
        )


def _paired_by_seed(group: Group, blocks: Sequence[Block]) -> Iterator[str]:
    """The mean of the seeds' differences, their range, and how many are more than chance."""
    pairs = [block.against for block in blocks if block.against]
    others = {in_words(Path(other.model).name, seed=False) for other, _ in pairs}
    asked = {other.n for other, _ in pairs}
    for name in COMPARED:
        found = [m for _, apart in pairs if (m := apart.get(name)) and m.value is not None]
        values = [m.value for m in found if m.value is not None]
        if not values:
            continue
        sure = sum((m.low or 0) > 0 or (m.high or 0) < 0 for m in found)
        yield (
            f"{blocks[0].task}: {group.name} less {' or '.join(sorted(others))}, seed by seed on"
            f" the same {' or '.join(f'{n:,}' for n in sorted(asked))} questions,"
            f" {SHORT.get(name, name)} {signed(math.fsum(values) / len(values))} on average,"
            f" from {signed(min(values))} to {signed(max(values))}: more than chance with"
            f" {sure} of {len(found)} seeds."
        )


def signed(value: float) -> str:
    """+0.0123, without a sign of nothing."""
    return f"{value:+.4f}" if round(value, 4) else "0"


def _without_smoothing(group: Group, made: Sequence[Group], task: str) -> Group | None:
    """The group at β = 0 that differs from this one in nothing else."""
    if not group.first.beta or task not in group.first.blocks:
        return None

    return next(
        (
            g
            for g in made
            if g.first.beta == 0
            and _apart_from_smoothing(g) == _apart_from_smoothing(group)
            and task in g.first.blocks
        ),
        None,
    )


def _apart_from_smoothing(group: Group) -> dict[str, Any]:
    """The settings that make two groups the same experiment at another β, in one order."""
    free = (*FREE, "label_smoothing")
    return {k: v for k, v in sorted(group.first.settings.items()) if k not in free}


def _of_smoothing(plain: Group, smoothed: Group, task: str) -> str:
    a, b = plain.measure(task, "ece"), smoothed.measure(task, "ece")
    if a is None or b is None or a.value is None or b.value is None:
        return f"{task}: there is no ECE to compare."
    settings = ", ".join(
        f"{name_of(field)} {text(smoothed.first.settings.get(field))}"
        for field in varied([e for g in (plain, smoothed) for e in g.entries])
    )
    least, most = sorted((len(plain.entries), len(smoothed.entries)))
    apart = None not in (a.low, a.high, b.low, b.high) and (
        (a.low or 0) > (b.high or 0) or (b.low or 0) > (a.high or 0)
    )
    if least > 1:
        seeds = f"{least}" if least == most else f"{least} and {most}"
        sure = (
            f"the ranges over their {seeds} seeds do not overlap"
            if apart
            else "the ranges over seeds overlap, so this may be chance"
        )
    else:
        sure = "the intervals do not overlap" if apart else "the intervals overlap"
        sure += "; it is one seed, and another may say otherwise"
    if f"{b.value:.4f}" == f"{a.value:.4f}":
        return (
            f"{task}: {smoothed.name}: ECE is {b.value:.4f} with {settings} as it is without"
            f" smoothing; {sure}."
        )
    way = "lower" if b.value < a.value else "higher"
    return (
        f"{task}: {smoothed.name}: ECE is {way} with {settings} than without smoothing,"
        f" {b.value:.4f} and not {a.value:.4f}; {sure}."
    )


def _best(made: Sequence[Group], what: Sequence[str]) -> set[tuple[str, str, str]]:
    """(group, task, measure) of the best value, where there are several to choose from."""
    best = set()
    for task, name in itertools.product(what, COLUMNS):
        values = {g.name: m.value for g in made if (m := g.measure(task, name))}
        known = {k: v for k, v in values.items() if v is not None}
        if len(known) > 1:
            wanted = max(known.values()) if name == "accuracy" else min(known.values())
            best |= {(k, task, name) for k, v in known.items() if v == wanted}
    return best


def _beside(made: Sequence[Group], task: str) -> tuple[list[str], list[tuple[str, list]]]:
    names = [n for n in BESIDE if any(g.measure(task, n) for g in made)]
    rows = [
        (g.name, [(n, g.measure(task, n)) for n in names]) for g in made if task in g.first.blocks
    ]
    return names, rows


def _pictures(made: Sequence[Group]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled rows of captioned drawings."""
    entries = [entry for group in made for entry in group.entries]
    rows: list[tuple[str, list[tuple[str, str]]]] = []
    for task in tasks(entries):
        of_task = [group.first for group in made if task in group.first.blocks]
        diagrams = [(e.name, page_drawings.reliability(e.blocks[task].bins)) for e in of_task]
        curves = {e.name: curve for e in of_task if (curve := e.blocks[task].curve)}
        if curves:
            diagrams.append(("Risk against coverage", page_drawings.risk_coverage(curves)))
        if against := _against_beta(made, task):
            diagrams.append(("ECE against β", against))
        rows.append((f"Reliability: {task}", diagrams))
    names = (("loss", "training loss, nats"), ("grad_norm", "gradient norm"))
    trained = []
    for field, label in names:
        drawn = {e.name: e.curves[field] for e in entries if e.curves.get(field)}
        if drawn:
            picture = page_drawings.lines(drawn, "step", label, log_y=field == "grad_norm")
            trained.append((label.capitalize(), picture))
    for field in sorted({f for e in entries for f in e.curves if f.startswith(HELD_OUT)}):
        drawn = {e.name: e.curves[field] for e in entries if len(e.curves.get(field, ())) > 1}
        if drawn:
            label = " ".join(SHORT.get(w, w) for w in field.removeprefix(HELD_OUT).split("_"))
            trained.append((f"Held out: {label}", page_drawings.lines(drawn, "step", label)))
    return [*rows, ("Training", trained)] if trained else rows


def _against_beta(made: Sequence[Group], task: str) -> str | None:
    """ECE against β, a line for each combination of the other settings that several β have."""
    found: dict[str, list[tuple[float, Measure, Group]]] = {}
    for group in made:
        m = group.measure(task, "ece")
        if group.first.beta is not None and m is not None and m.value is not None:
            same = repr(_apart_from_smoothing(group))
            found.setdefault(same, []).append((group.first.beta, m, group))
    several = [sorted(line, key=lambda p: p[0]) for line in found.values() if len(line) > 1]
    if not several:
        return None
    fields = varied([entry for line in several for *_, g in line for entry in g.entries])
    fields = [field for field in fields if field != "label_smoothing"]
    drawn, intervals = {}, {}
    for line in several:
        settings = line[0][2].first.settings
        name = ", ".join(f"{name_of(f)} {text(settings.get(f))}" for f in fields) or "ECE"
        drawn[name] = [(beta, m.value or 0.0) for beta, m, _ in line]
        intervals[name] = [m for _, m, _ in line]
    return page_drawings.lines(drawn, "β", "ECE", intervals=intervals)


def _versions(entries: Sequence[Entry]) -> list[str]:
    """Once each: what made the numbers."""
    found = {}
    for e in entries:
        versions = ", ".join(f"{name} {v}" for name, v in e.versions.items() if v)
        found.setdefault(f"{e.device}; {versions}", []).append(e.name)
    if len(found) == 1:
        return list(found)
    return [f"{', '.join(names)}: {said}" for said, names in found.items()]
