"""The result of an evaluation as a file: what `python -m train.evaluate` writes and others read.

A result is one JSON object, `result.json` in the evaluation's folder. Its fields are those of
`Result` and of the dataclasses in it, by the same names; a field that this version does not know is
left unread, so that later versions may add some. What was found for each question lies beside it,
in the file that `TaskResult.items` names.

Probabilities and errors are shares (0.25, not 25), log-likelihoods nats. What is not defined, as
the AUROC of a model that is always right, is null.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train import files

FORMAT = "lsce-evaluation"
VERSION = 1
RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number with its 95 % bootstrap interval, from resampling the questions."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Bin:
    """A bin of confidence [low, high), the last one closed. Empty ones are there, with zeros."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean confidence in it."""
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """The risk–coverage curve at up to 200 points: see `lsce.calibration.risk_coverage`."""

    coverage: list[float]
    risk: list[float]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A part of a task's questions."""

    name: str
    n: int
    accuracy: float
    confidence: float
    ece: float
    nll: float | None


@dataclasses.dataclass(frozen=True)
class Temperature:
    """The same predictions with their logits divided by one number, fitted on other questions."""

    value: float
    fitted_on: str
    n: int
    """Questions that it was fitted on."""
    measures: dict[str, Measure]
    bins: list[Bin]


@dataclasses.dataclass(frozen=True)
class Scored:
    """One way of reading the same log-likelihoods as probabilities of the choices."""

    n: int
    measures: dict[str, Measure]
    """By the names in `measures.NAMES`: accuracy, ece, auroc, …"""
    bins: list[Bin]
    """The reliability diagram's: 15 even ones."""
    risk_coverage: Curve
    subjects: list[Subject] = dataclasses.field(default_factory=list)
    """Where the task has several, by name."""
    temperature: Temperature | None = None


@dataclasses.dataclass(frozen=True)
class Against:
    """This model less another one on the same questions, which are resampled together."""

    model: str
    """The other's name."""
    result: str
    """Its result file."""
    n: int
    scorings: dict[str, dict[str, Measure]]
    """By scoring and measure: this model's value less the other's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model is worth at one task."""

    task: str
    data: str
    """Where the questions came from: a file, a folder or a data set's name."""
    data_sha256: str
    """The questions' as read and worded, in order: equal for two models if they answered the
    same."""
    questions: int
    """Those scored."""
    available: int
    """Those in the data, before --limit."""
    left_out: int
    """Too long for the context even without shots."""
    prompt: str
    """hendrycks or harness."""
    answer: str
    """letters or text."""
    shots: int
    """Solved examples before each question, at most."""
    shots_dropped: int = 0
    """Questions that had fewer, for the context's sake."""
    chance: float
    """The accuracy of guessing."""
    letter_tokens: int | None = None
    """Tokens of the longest letter: 1, or the tokenizer splits letters; null for text."""
    reported: str
    """The scoring that tables and pictures show first."""
    scorings: dict[str, Scored]
    """Letters: choices (softmax over the letters), vocabulary (over all tokens). Text: sum,
    per_character, per_token (of log-likelihoods, then softmax over the choices)."""
    items: str
    """File beside the result: a line for each question."""
    against: Against | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """An evaluation of one model."""

    model: str
    """As it was named."""
    weights: str
    """A checksum of its weights: of two equal ones the models are the same."""
    step: int | None = None
    """The optimizer step of a run's checkpoint; None for other models."""
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The flags of the run that trained it; empty for other models."""
    label_smoothing: float | None = None
    """The run's β; null for other models."""
    command: str
    seed: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The evaluation's own flags."""
    versions: dict[str, str | None]
    device: str
    tasks: dict[str, TaskResult]
    """By name; a file's is its path."""
    tokens: Scored | None = None
    """Next-token prediction on held-out responses (--tokens)."""
    tokens_data: str | None = None


def write(path: Path, result: Result) -> None:
    """Writes the result as JSON, whole or not at all."""
    head = {"format": FORMAT, "version": VERSION}
    files.write_json(path, head | files.plain(dataclasses.asdict(result)))


def read(path: Path) -> Result:
    """The result in a file, or in a folder's `result.json`.

    Raises:
      ValueError: naming the file that is missing, is no result, or is of a later version.
    """
    path = path / RESULT if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no result {path}: python -m train.evaluate writes one")
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT:
            raise ValueError("of another format")
        if found["version"] > VERSION:
            raise ValueError(f"of version {found['version']}, and this program reads {VERSION}")
        return _result(found)
    except (ValueError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no result of train.evaluate: {why}") from None


def _result(found: Mapping[str, Any]) -> Result:
    tasks = {name: _task(task) for name, task in found["tasks"].items()}
    return _known(Result, found, tasks=tasks, tokens=_optional(_scored, found.get("tokens")))


def _task(found: Mapping[str, Any]) -> TaskResult:
    return _known(
        TaskResult,
        found,
        scorings={name: _scored(scored) for name, scored in found["scorings"].items()},
        against=_optional(_against, found.get("against")),
    )


def _against(found: Mapping[str, Any]) -> Against:
    scorings = {name: _measures(measures) for name, measures in found["scorings"].items()}
    return _known(Against, found, scorings=scorings)


def _scored(found: Mapping[str, Any]) -> Scored:
    return _known(
        Scored,
        found,
        measures=_measures(found["measures"]),
        bins=[_known(Bin, b) for b in found["bins"]],
        risk_coverage=_known(Curve, found["risk_coverage"]),
        subjects=[_known(Subject, s) for s in found.get("subjects", [])],
        temperature=_optional(_temperature, found.get("temperature")),
    )


def _temperature(found: Mapping[str, Any]) -> Temperature:
    bins = [_known(Bin, b) for b in found["bins"]]
    return _known(Temperature, found, measures=_measures(found["measures"]), bins=bins)


def _measures(found: Mapping[str, Any]) -> dict[str, Measure]:
    return {name: _known(Measure, measure) for name, measure in found.items()}


def _optional(read_one: Any, found: Mapping[str, Any] | None) -> Any:
    return None if found is None else read_one(found)


def _known[T](cls: type[T], found: Mapping[str, Any], **parsed: Any) -> T:
    """The dataclass with the fields that it knows of."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: found[name] for name in names & found.keys() - parsed.keys()}, **parsed)
