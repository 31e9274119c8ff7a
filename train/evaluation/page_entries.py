"""What a report compares: evaluations of runs and results of `train.evaluate`, read into one form.

An entry is one model with what it scored at one or several tasks. A run that is not finished is no
entry and not forgotten: it is listed as it stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsce.calibration import wilson_interval
from train.evaluation import results
from train.evaluation.comparison import name_of
from train.evaluation.measures import BINS, within
from train.evaluation.results import Against, Bin, Curve, Measure
from train.run import folder as run_folder
from train.run.metrics import HELD_OUT

SWEEP = "sweep.json"
MOST_POINTS = 250
"""Points of a training curve; more cannot be told apart on a screen."""
RESAMPLES = 1000
TEMPERATURE = ", with a fitted temperature"
TOKENS = "held-out tokens"
"""Ends the name of a task whose logits were divided by one."""
PATHS = ("out", "data", "eval_data", "resume", "overwrite")
"""Flags that say where things are and not what was done."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What a model scored at one task, in one scoring."""

    task: str
    """Task, number of shots, prompt and scoring, in words."""
    n: int
    chance: float | None
    measures: dict[str, Measure]
    bins: list[Bin]
    curve: Curve | None
    data: str = ""
    """What tells whether two models were asked the same; empty where nothing does."""
    against: tuple[Against, dict[str, Measure]] | None = None
    """Another model, and the paired differences from it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the report."""

    name: str
    source: str
    """The file that its numbers are from."""
    settings: dict[str, Any]
    """The flags that it was trained with; empty for a model that others trained."""
    blocks: dict[str, Block]
    """By their `task`."""
    curves: dict[str, list[tuple[int, float]]]
    """Training's curves: (step, value) by name."""
    versions: Mapping[str, str | None]
    device: str
    command: str | None = None

    @property
    def beta(self) -> float | None:
        return self.settings.get("label_smoothing")


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """A run that was asked for and has no evaluation."""

    name: str
    status: str


def read(paths: Sequence[Path]) -> tuple[list[Entry], list[Unfinished]]:
    """The entries of runs, sweeps, result files and their folders, in the order given.

    Raises:
      ValueError: naming what is none of these or damaged, and where nothing is finished.
    """
    entries: list[Entry] = []
    unfinished: list[Unfinished] = []
    for path in paths:
        for name, one in _expand(path):
            match one if isinstance(one, Unfinished) else _read(name, one):
                case Entry() as entry:
                    entries.append(entry)
                case Unfinished() as run:
                    unfinished.append(run)
    if not entries:
        raise ValueError("none of these is finished, so there is nothing to report")
    return _named_apart([_in_words(entry) for entry in _merged(entries)]), unfinished


def _expand(path: Path) -> Sequence[tuple[str, Path | Unfinished]]:
    """A sweep is its runs; everything else is itself."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    if not (path / SWEEP).is_file():
        return [(path.resolve().name, path)]
    with _readable(path / SWEEP):
        return [
            (run["name"], path / run["name"])
            if (path / run["name"] / run_folder.RUN_FILE).is_file()
            else (run["name"], Unfinished(run["name"], run["status"]))
            for run in _json(path / SWEEP)["runs"]
        ]


def _read(name: str, path: Path) -> Entry | Unfinished:
    if (path / run_folder.RUN_FILE).is_file():
        return _run(name, path)
    if path.is_file() or (path / results.RESULT).is_file():
        return _result(results.read(path), path)
    raise ValueError(
        f"{path} is neither a run ({run_folder.RUN_FILE}), nor a sweep ({SWEEP}), nor a result of"
        f" train.evaluate ({results.RESULT})"
    )


def _run(name: str, path: Path) -> Entry | Unfinished:
    """A run by its own evaluation at the end of training."""
    if not (path / run_folder.EVALUATION).is_file():
        curves = _curves(path / run_folder.METRICS)
        last = max((points[-1][0] for points in curves.values()), default=0)
        return Unfinished(name, f"not finished: {last} steps done")
    with _readable(path / run_folder.EVALUATION):
        return _evaluated(name, path, _json(path / run_folder.EVALUATION))


def _evaluated(name: str, path: Path, found: Mapping[str, Any]) -> Entry:
    choices = found["choices"]
    blocks = {}
    for task, scores, chance in (
        ("held-out questions", choices.get(choices["reported"]), choices["chance"]),
        (TOKENS, found["tokens"], None),
    ):
        if scores:
            bins = [Bin(**entry) for entry in scores["bins"]]
            measures = {
                "accuracy": _accuracy(scores["accuracy"], scores["n"]),
                "confidence": Measure(scores["mean_confidence"]),
                "ece": ece_from_bins(bins),
                "rms": Measure(scores["rms"]),
                "brier": Measure(scores["brier"]),
                "nll": Measure(scores["nll"]),
            }
            blocks[task] = Block(task, scores["n"], chance, measures, bins, None)
    settings = {key: value for key, value in found["config"].items() if key not in PATHS}
    return Entry(
        name=name,
        source=run_folder.EVALUATION,
        settings=settings,
        blocks=blocks,
        curves=_curves(path / run_folder.METRICS),
        versions=found["versions"],
        device=found["device"],
    )


def _result(result: results.Result, path: Path) -> Entry:
    """A result of train.evaluate, with the curves of its run where they are still there."""
    blocks = {}
    for task in result.tasks.values():
        scored = task.scorings[task.reported]
        asked = f"{Path(task.task).name}, {task.shots}-shot, {task.prompt} {task.answer}"
        words = f"{asked} ({task.reported})"
        block = Block(
            words,
            scored.n,
            task.chance,
            scored.measures,
            scored.bins,
            scored.risk_coverage,
            data=task.data_sha256,
            against=_paired(task),
        )
        blocks[words] = block
        if scored.temperature:
            fitted = scored.temperature
            named = words + TEMPERATURE
            blocks[named] = Block(named, scored.n, None, fitted.measures, fitted.bins, None)
    if (seen := result.tokens) is not None:
        words = f"tokens of {_names(result.tokens_data)}"
        blocks[words] = Block(words, seen.n, None, seen.measures, seen.bins, seen.risk_coverage)
    run = Path(result.model)
    settings = {key: value for key, value in result.flags.items() if key not in PATHS}
    if result.label_smoothing is not None:
        settings["label_smoothing"] = result.label_smoothing
    return Entry(
        name=run.resolve().name if run.exists() else run.name,
        source=path.name,
        settings=settings,
        blocks=blocks,
        curves=_curves(run / run_folder.METRICS),
        versions=result.versions,
        device=result.device,
        command=result.command,
    )


def _paired(task: results.TaskResult) -> tuple[Against, dict[str, Measure]] | None:
    apart = task.against.scorings.get(task.reported) if task.against else None
    return (task.against, apart) if task.against and apart else None


def _names(paths: str | None) -> str:
    """Without the folders."""
    return " ".join(Path(path).name for path in (paths or "held-out responses").split(" "))


def ece_from_bins(bins: Sequence[Bin], resamples: int = RESAMPLES) -> Measure:
    """ECE with a 95 % interval where only the bins were kept.

    Predictions are drawn again into the bins by their shares, and right by the bins' accuracies;
    the mean confidence of a bin stays. "Basic" as in `lsce.calibration.bootstrap_interval`, cut to
    [0, 1].
    """
    count = np.array([b.count for b in bins])
    n = int(count.sum())
    if not n:
        return Measure(None)
    accuracy, confidence = (np.array([getattr(b, x) for b in bins]) for x in _OF_A_BIN)
    ece = float(np.sum(count / n * np.abs(accuracy - confidence)))
    r = np.random.default_rng(0)
    drawn = r.multinomial(n, count / n, size=resamples)
    right = r.binomial(drawn, np.clip(accuracy, 0, 1))
    again = np.abs(right - drawn * confidence).sum(axis=1) / n
    low, high = np.quantile(again, [0.025, 0.975])
    return within("ece", Measure(ece, float(2 * ece - high), float(2 * ece - low)))


_OF_A_BIN = "accuracy", "confidence"
assert BINS == 15  # what both kinds of file hold, and what the page says


def _accuracy(value: float, n: int) -> Measure:
    low, high = wilson_interval(round(value * n), n)
    return Measure(value, float(low), float(high))


def _curves(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """The rows of metrics.jsonl by name, thinned to what a picture shows."""
    found: dict[str, list[tuple[int, float]]] = {}
    if metrics.is_file():
        for line in metrics.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line, where a run was killed
            for name, value in row.items() if isinstance(row, dict) else ():
                wanted = name in ("loss", "grad_norm") or name.startswith(HELD_OUT)
                if wanted and value is not None:
                    found.setdefault(name, []).append((row["step"], value))
    return {name: _thinned(points) for name, points in found.items()}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over neighbours, at most `MOST_POINTS` of them."""
    parts = np.array_split(np.array(points), min(len(points), MOST_POINTS))
    return [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def _merged(entries: list[Entry]) -> list[Entry]:
    """A run and results of `train.evaluate` on it are one entry."""
    merged: list[Entry] = []
    for entry in entries:
        for k, other in enumerate(merged):
            same = entry.settings and (entry.name, entry.settings) == (other.name, other.settings)
            if same and not entry.blocks.keys() & other.blocks.keys():
                merged[k] = dataclasses.replace(
                    other,
                    blocks=other.blocks | entry.blocks,
                    source=f"{other.source}, {entry.source}",
                    command=other.command or entry.command,
                )
                break
        else:
            merged.append(entry)
    return merged


def _in_words(entry: Entry) -> Entry:
    """With words for a name that a sweep made of flags."""
    fields = [part.partition("=")[0] for part in entry.name.split(",")]
    known = all(field in entry.settings for field in fields)
    return dataclasses.replace(entry, name=in_words(entry.name)) if known else entry


def in_words(name: str, *, seed: bool = True) -> str:
    """ "learning rate 0.001, β 0.1" for a name that a sweep made of flags, which has no blank where
    a line may end; others as they are."""
    parts = [part.partition("=") for part in name.split(",")]
    if not all(equals for _, equals, _ in parts):
        return name
    kept = [(field, value) for field, _, value in parts if seed or field != "seed"]
    return ", ".join(f"{name_of(field)} {value}" for field, value in kept)


def _named_apart(entries: list[Entry]) -> list[Entry]:
    """With the folder's number where two have one name."""
    seen: dict[str, int] = {}
    named = []
    for entry in entries:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        again = f" ({seen[entry.name]})" if seen[entry.name] > 1 else ""
        named.append(dataclasses.replace(entry, name=entry.name + again))
    return named


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors over what a file holds name it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error!r}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
