"""What experiments are made of: data, runs, evaluations and the page that shows them.

All experiments share a folder, and a run or an evaluation that two of them need is made once:

    data/                     the records trained on
    runs/MODEL-DATA/RUN/      eval.json, metrics.jsonl, run.json, …; RUN says what is varied
    evaluations/…/            result.json and answers of the same names, and of the models before
    NAME-MODEL-DATA.html      an experiment's page
    steps.json                each command with its status, seconds and commit

Several processes may share it, each with a model of its own, as on several GPUs.
Weights of a run that is evaluated are removed. Without `checkpoints` and `model` the folder is a
few megabytes, and goes on on another machine: a run that was not finished begins again there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.paper import published
from benchmarks.paper.plan import Step, work
from train.run import folder
from train.run.checkpoint import saved_steps
from train.sweep import run_name

TRAIN = "train.__main__"
BATCH_ROWS = 32
"""Packed rows of 512 tokens in a step: about the 128 records of the paper's batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperFlags:
    """What every experiment can be told."""

    model: Annotated[str, shown("MODEL")] = "smollm2-135m"
    """What is fine-tuned."""
    data: Annotated[str, shown("{alpaca,dolly}|FILE")] = "alpaca"
    """What on: alpaca is 9,229 of its records drawn at random, without the empty ones."""
    data_folder: Annotated[pathlib.Path | None, shown("FOLDER", "the Hugging Face hub")] = None
    """A folder with a folder each of alpaca, dolly, mmlu, arc and hellaswag, with the files as they
    were published. What it has not comes from the hub."""
    out: Annotated[pathlib.Path, shown("FOLDER")] = pathlib.Path("runs/paper")
    """Where runs and results go, of all experiments: what two of them need is made once."""
    minutes: Annotated[float | None, shown("M", "no limit")] = None
    """Stop in time for a machine that is lent; the same command goes on. What does not stop within
    45 seconds is killed."""
    epochs: Annotated[float, shown("X")] = 3.0
    """Times to see all training rows."""
    rows: Annotated[int, shown("ROWS")] = BATCH_ROWS
    """Rows, of a step's 32, that are in memory at a time."""
    seeds: Annotated[tuple[int, ...], shown("SEED ...")] = (0, 1, 2)
    """Decide weights, data and dropout: a run of each."""
    tasks: Annotated[tuple[str, ...], shown("TASK ...")] = published.ASKED
    """What is evaluated besides the held-out records."""
    limit: Annotated[int | None, shown("N", "all")] = None
    """Questions of each task."""
    resamples: Annotated[int, shown("N")] = 1000
    """Of the bootstrap of an evaluation. 0 on a machine that is lent: `gather` makes them up for
    from the answers, wherever."""
    commit: Annotated[str | None, shown("COMMIT", "git's answer")] = None
    """What steps.json records where the checkout has no git."""
    tiny: Annotated[bool, shown("", help="A few made-up records and steps, for a CPU.")] = False

    def check(self) -> None:
        """ValueError for a value that no experiment can come of."""
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, not {self.minutes:g}")
        if self.rows < 1 or BATCH_ROWS % self.rows:
            raise ValueError(f"--rows must divide {BATCH_ROWS}, not {self.rows}")
        if self.resamples < 0:
            raise ValueError(f"--resamples must be at least 0, not {self.resamples}")
        if not self.seeds:
            raise ValueError("--seeds has no value")
        for task in self.tasks if not self.tiny else ():
            if task not in published.ASKED:
                raise ValueError(f"--tasks {task}: must be of {', '.join(published.ASKED)}")
        if self.data_folder is not None and not self.data_folder.is_dir():
            raise ValueError(f"--data-folder {self.data_folder} is no folder")
        named = self.tiny or self.data in published.INSTRUCTIONS
        if not named and not pathlib.Path(self.data).is_file():
            raise ValueError(f"--data {self.data}: must be alpaca, dolly or a file")

    @property
    def group(self) -> str:
        """MODEL-DATA, in the names of folders and pages."""
        return "tiny" if self.tiny else f"{self.base}-{pathlib.Path(self.data).stem}"

    @property
    def base(self) -> str:
        """The model, in the names of folders and pages. Who works at one has its runs, and its
        evaluation before any, which all data share."""
        return "tiny" if self.tiny else pathlib.Path(self.model).name


@dataclasses.dataclass(frozen=True)
class Experiment[F: PaperFlags]:
    """A command: its flags, and the steps that they make."""

    name: str
    about: str | None
    """What --help begins with."""
    flags: type[F]
    plan: Callable[[F], Iterator[Step]]

    def parse(self, arguments: Sequence[str] | None = None) -> F:
        found = flags.parse(self.flags, f"paper.{self.name}", self.about, arguments)
        return dataclasses.replace(found, seeds=found.seeds[:1]) if found.tiny else found

    def make(self, options: F) -> int:
        """Works the plan off; ValueError before anything is if data are missing."""
        prepare(options)
        return work(self.plan(options), options.out, options.minutes, options.commit, options.base)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        return flags.run(f"paper.{self.name}", self.parse, self.make, arguments)


def prepare(options: PaperFlags) -> None:
    """Makes what is trained on, and looks for the questions; ValueError for what cannot be had."""
    if options.tiny:
        sums = [(a, b) for a in range(8) for b in range(8)]
        made = [
            {"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."} for a, b in sums
        ]
        published.write_lines(records(options), made)
        asked = [
            {"question": f"What is {a} and 1?", "choices": [str(a + 1), str(a + 3)], "answer": 0}
            for a in range(6)
        ]
        published.write_lines(_tiny_task(options), asked)
        return
    published.check_questions(options.tasks, options.data_folder)
    if options.data in published.INSTRUCTIONS and not records(options).exists():
        published.write_instructions(options.data, options.data_folder, records(options))


def records(options: PaperFlags) -> pathlib.Path:
    """The file to train on."""
    if options.tiny or options.data in published.INSTRUCTIONS:
        return options.out / "data" / f"{'tiny' if options.tiny else options.data}.jsonl"
    return pathlib.Path(options.data)


def training(options: PaperFlags) -> dict[str, object]:
    """Flags of every run: full fine-tuning with AdamW as the paper has it."""
    common: dict[str, object] = {
        "data": records(options),
        "model": options.model,
        "dropout": 0.1,
        "keep": 1,
    }
    if options.tiny:
        return common | {"model": "nano", "steps": 2, "max_length": 64, "vocab_size": 300}
    return common | {
        "epochs": options.epochs,
        "batch_size": options.rows,
        "accumulate": BATCH_ROWS // options.rows,
        "max_length": 512,
        "held_out": 0.05,
        "dtype": "bfloat16",
        "remat": "none",
        # A checkpoint is three times the weights; a signal saves one in any case.
        "checkpoint_every": 500,
    }


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of an experiment, in the folder of all of them."""

    name: str
    flags: Mapping[str, object]
    options: PaperFlags
    module: str = TRAIN

    @property
    def out(self) -> pathlib.Path:
        return self.options.out / "runs" / self.options.group / self.name

    @property
    def evaluated(self) -> pathlib.Path:
        return self.options.out / "evaluations" / self.options.group / self.name

    @property
    def trained(self) -> bool:
        return (self.out / folder.EVALUATION).is_file()

    def step(self, tasks: Sequence[str]) -> Step:
        """Trains, if its weights are not there and one of the tasks wants them."""

        def done() -> bool:
            there = bool(saved_steps(self.out))
            return self.trained and (there or _answered(self.options, self.evaluated, tasks))

        if not done() and self.trained:
            # It is not finished any more, and on another chip its weights may be others.
            (self.out / folder.EVALUATION).unlink()
            shutil.rmtree(self.evaluated, ignore_errors=True)
        resumed = ["--resume"] if (self.out / folder.RUN_FILE).is_file() else []
        given = [x for field, value in self.flags.items() for x in _flag(field, value)]
        given = (*given, "--out", str(self.out), *resumed)
        return Step(f"train {self.options.group}/{self.name}", self.module, given, done)

    def spend(self) -> None:
        """Removes the weights of a finished run, and what says how to read them."""
        if self.trained:
            for name in (folder.CHECKPOINTS, folder.MODEL):
                shutil.rmtree(self.out / name, ignore_errors=True)


def grid(
    options: PaperFlags, varied: Mapping[str, Sequence[object]], module: str = TRAIN
) -> list[Run]:
    """A run for every combination, with a name that says it; "None" is what a flag is without."""
    common = training(options)
    if "steps" in varied:
        common.pop("epochs", None)
    found = []
    for values in itertools.product(*varied.values()):
        own = {k: v for k, v in zip(varied, values, strict=True) if v != "None"}
        found.append(Run(run_name(own), common | own, options, module))
    return found


def judged(run: Run) -> Iterator[Step]:
    """Trains, evaluates at every task, and lets go of the weights."""
    options, tasks = run.options, tasks_of(run.options)
    yield run.step(tasks)
    if run.trained:
        yield from evaluations(options, str(run.out), run.evaluated)
        if _answered(options, run.evaluated, tasks):
            run.spend()


def tasks_of(options: PaperFlags) -> Sequence[str]:
    return (str(_tiny_task(options)),) if options.tiny else options.tasks


def before(options: PaperFlags) -> pathlib.Path:
    """Where the model's own evaluation is, before any fine-tuning."""
    return options.out / "evaluations" / "before" / options.base


def evaluations(options: PaperFlags, model: str, out: pathlib.Path) -> Iterator[Step]:
    """A `train.evaluate` of a model at all tasks that are asked alike, into one result.

    Weights are read and pictures drawn once for each of these, seconds in which no GPU works.
    """

    def alike(task: str) -> tuple[bool, bool]:
        return task in published.FITTED, bool(published.questions_of(task, options.data_folder))

    for (fitted, there), same in itertools.groupby(
        sorted(tasks_of(options), key=alike, reverse=True), alike
    ):
        tasks = list(same)
        given: list[object] = ["--model", model, "--task", *tasks, "--out", out]
        if options.tiny:
            given += ["--resamples", 50, "--max-length", 128]
        else:
            given += ["--dtype", "bfloat16", "--resamples", options.resamples]
            if there:
                given += ["--task-data", options.data_folder]
            if fitted:
                given += ["--temperature-from", "validation"]
        if options.limit is not None:
            given += ["--limit", options.limit]
        asked = " and ".join(pathlib.Path(task).stem for task in tasks)
        yield Step(
            f"evaluate {out.parent.name}/{out.name} at {asked}",
            "train.evaluate",
            tuple(map(str, given)),
            lambda tasks=tasks: _answered(options, out, tasks),
        )


def _answered(options: PaperFlags, out: pathlib.Path, tasks: Sequence[str]) -> bool:
    """Whether the result has these tasks, each with as many questions as are asked for now."""
    found = read(out / "result.json") or {"tasks": (), "settings": {"limit": options.limit}}
    return found["settings"]["limit"] == options.limit and set(tasks) <= set(found["tasks"])


def page(options: PaperFlags, name: str, title: str, runs: Iterable[Run], *more: pathlib.Path):
    """The report of runs with their evaluations, made anew each time: it takes seconds."""
    there = list(more)
    for run in runs:
        there += [run.out, run.evaluated]
    there = [path for path in there if path.exists()]
    html = options.out / f"{name}-{options.group}.html"
    newest = max((_time(path) for path in there), default=0.0)
    title = "Made-up records, which show nothing" if options.tiny else title
    return Step(
        "report",
        "train.report",
        (*map(str, there), "--title", title, "--out", str(html)),
        lambda: html.exists() and html.stat().st_mtime > newest,
    )


def swept(
    options: PaperFlags, name: str, title: str, varied: Mapping[str, Sequence[object]]
) -> Iterator[Step]:
    """Runs that differ in some flags, each evaluated at every task, on one page.

    With one seed everything is compared before another seed is begun.
    """
    runs = [run for seed in options.seeds for run in grid(options, {**varied, "seed": (seed,)})]
    for run in runs:
        yield from judged(run)
    yield page(options, name, title, runs)


def _flag(field: str, value: object) -> tuple[str, str]:
    return f"--{field.replace('_', '-')}", str(value)


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _time(path: pathlib.Path) -> float:
    files = [path / name for name in (folder.EVALUATION, "result.json")]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _tiny_task(options: PaperFlags) -> pathlib.Path:
    return options.out / "data" / "tiny-questions.jsonl"
