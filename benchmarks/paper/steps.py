"""What experiments are made of: data, sweeps, evaluations and the page that shows them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.measure import report
from benchmarks.paper.plan import Step, python, work

BATCH_ROWS = 32
"""Packed rows of 512 tokens in a step: about the 128 records of the paper's batches."""
TASKS = {"mmlu": "mmlu", "hellaswag": "hellaswag", "arc-easy": "arc"}
"""The folder of --data-folder that each task's questions are in."""
FITTED = ("mmlu", "arc-easy")
"""Tasks with other questions to fit a temperature on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperFlags:
    """What every experiment can be told."""

    model: Annotated[str, shown("MODEL")] = "smollm2-135m"
    """What is fine-tuned."""
    data: Annotated[str, shown("{alpaca,dolly}|FILE")] = "alpaca"
    """What on: alpaca is its random 9,229 records without the empty ones."""
    data_folder: Annotated[pathlib.Path, shown("FOLDER")] = pathlib.Path("shared/data")
    """Where alpaca, dolly, mmlu, arc and hellaswag lie, each in a folder of its own."""
    out: Annotated[pathlib.Path, shown("FOLDER", "runs/EXPERIMENT")] = pathlib.Path()
    """Where runs and results go."""
    minutes: Annotated[float | None, shown("M", "no limit")] = None
    """Stop in time for a machine that is lent; the same command goes on."""
    epochs: Annotated[float, shown("X")] = 3.0
    """Times to see all training rows."""
    seeds: Annotated[tuple[int, ...], shown("SEED ...")] = (0, 1, 2)
    """Of weights, data and dropout: a run of each."""
    tasks: Annotated[tuple[str, ...], shown("TASK ...")] = tuple(TASKS)
    """What is evaluated besides the held-out records."""
    limit: Annotated[int | None, shown("N", "all")] = None
    """Questions of each task."""
    tiny: Annotated[bool, shown("", help="A few made-up records and steps, for a CPU.")] = False

    def check(self) -> None:
        """ValueError for a value that no experiment can come of."""
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, not {self.minutes:g}")
        if not self.seeds:
            raise ValueError("--seeds has no value")
        for task in self.tasks if not self.tiny else ():
            if task not in TASKS:
                raise ValueError(f"--tasks {task}: must be of {', '.join(TASKS)}")
        named = self.tiny or self.data in ("alpaca", "dolly")
        if not named and not pathlib.Path(self.data).is_file():
            raise ValueError(f"--data {self.data}: must be alpaca, dolly or a file")


@dataclasses.dataclass(frozen=True)
class Experiment[F: PaperFlags]:
    """A command: its flags, and the steps that they make."""

    name: str
    about: str | None
    """What --help begins with."""
    flags: type[F]
    plan: Callable[[F], Iterator[Step]]

    def parse(self, arguments: Sequence[str] | None = None) -> F:
        """The flags, with the experiment's own folder where none is given."""
        found = flags.parse(self.flags, f"paper.{self.name}", self.about, arguments)
        if found.out == pathlib.Path():
            found = dataclasses.replace(found, out=pathlib.Path("runs") / self.name)
        return dataclasses.replace(found, seeds=found.seeds[:1]) if found.tiny else found

    def make(self, options: F) -> int:
        return work(self.plan(options), options.out, options.minutes)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        return flags.run(f"paper.{self.name}", self.parse, self.make, arguments)


def swept(
    options: PaperFlags, name: str, title: str, varied: Mapping[str, Sequence[object]]
) -> Iterator[Step]:
    """Runs that differ in some flags, each evaluated at every task, on one page."""
    out = options.out / "runs"
    yield sweep(name, out, {**training(options), "seed": options.seeds, **varied})
    results = [out]
    for result, step in evaluations(options, runs(out)):
        results.append(result)
        yield step
    yield page(options, title, results)


def records(options: PaperFlags) -> pathlib.Path:
    """The file to train on, made from the published ones where it is not there yet."""
    if options.tiny:
        made = [
            {"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."}
            for a in range(8)
            for b in range(8)
        ]
    elif options.data in ("alpaca", "dolly"):
        folder = options.data_folder / options.data
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise ValueError(f"there is no *.jsonl in {folder}: name its parent by --data-folder")
        lines = [line for file in files for line in file.read_text("utf-8").split("\n")]
        made = [json.loads(line) for line in lines if line.strip()]
        if options.data == "alpaca":
            fields = ("instruction", "input", "output")
            sample = [r for r in made if "random_9k" in r["subsets"] and r["output"].strip()]
            made = [{name: r[name] for name in fields} for r in sample]
    else:
        return pathlib.Path(options.data)
    path = options.out / "data" / f"{'tiny' if options.tiny else options.data}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(path.name + ".tmp")
        whole.write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
        whole.replace(path)
    return path


def training(options: PaperFlags) -> dict[str, tuple[object, ...]]:
    """Flags of every run: full fine-tuning with AdamW as the paper has it."""
    common: dict[str, tuple[object, ...]] = {
        "data": (records(options),),
        "model": (options.model,),
        "dropout": (0.1,),
        "keep": (1,),
    }
    if options.tiny:
        small = {"model": ("nano",), "steps": (2,), "max_length": (64,), "vocab_size": (300,)}
        return common | small
    return common | {
        "epochs": (options.epochs,),
        "batch_size": (BATCH_ROWS // 2,),
        "accumulate": (2,),
        "max_length": (512,),
        "held_out": (0.05,),
        "dtype": ("bfloat16",),
        # A checkpoint is three times the weights; a signal saves one in any case.
        "checkpoint_every": (500,),
    }


def sweep(name: str, out: pathlib.Path, varied: Mapping[str, Sequence[object]]) -> Step:
    """A `train.sweep` over these flags, which are of one value or several each."""
    given = _flags(varied)

    def done() -> bool:
        found = read(out / "sweep.json")
        return bool(found) and all(run["status"] == "done" for run in found["runs"])

    return Step(name, python("train.sweep", *given, "--out", out), done)


def single(name: str, out: pathlib.Path, given: Mapping[str, Sequence[object]]) -> Step:
    """One run of `train`, which goes on where it was."""
    resumed = ["--resume"] if (out / "run.json").is_file() else []
    command = python("train", *_flags(given), "--out", out, *resumed)
    return Step(name, command, lambda: (out / "eval.json").is_file())


def runs(*sweeps: pathlib.Path) -> dict[str, pathlib.Path]:
    """The finished runs of sweeps, by sweep and name."""
    found = {}
    for out in sweeps:
        for run in (read(out / "sweep.json") or {"runs": []})["runs"]:
            if run["status"] == "done":
                found[f"{out.name}/{run['name']}"] = out / run["name"]
    return found


def evaluations(
    options: PaperFlags, models: Mapping[str, str | pathlib.Path]
) -> Iterator[tuple[pathlib.Path, Step]]:
    """A `train.evaluate` of each model at each task, into one result a model."""
    for name, model in models.items():
        out = options.out / "evaluations" / name.replace("/", "-")
        for task in (_tiny_task(options),) if options.tiny else options.tasks:
            given: list[object] = ["--model", model, "--task", task, "--out", out]
            if options.tiny:
                given += ["--resamples", 50, "--max-length", 128]
            else:
                given += ["--task-data", options.data_folder / TASKS[task], "--dtype", "bfloat16"]
                if task in FITTED:
                    given += ["--temperature-from", "validation"]
            if options.limit is not None:
                given += ["--limit", options.limit]
            step = Step(
                f"evaluate {name} at {pathlib.Path(task).stem}",
                python("train.evaluate", *given),
                lambda out=out, task=task: (
                    task in (read(out / "result.json") or {}).get("tasks", ())
                ),
            )
            yield out, step


def page(options: PaperFlags, title: str, what: Iterable[pathlib.Path]) -> Step:
    """The report, made anew each time: it takes seconds."""
    there = [path for path in dict.fromkeys(what) if path.exists()]
    html = options.out / "report.html"
    newest = max((_time(path) for path in there), default=0.0)
    title = "Made-up records, which show nothing" if options.tiny else title
    return Step(
        "report",
        python("train.report", *there, "--title", title, "--out", html),
        lambda: html.exists() and html.stat().st_mtime > newest,
    )


def _flags(values: Mapping[str, Sequence[object]]) -> list[object]:
    return [
        part for field, given in values.items() for part in (f"--{field.replace('_', '-')}", *given)
    ]


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _time(path: pathlib.Path) -> float:
    newest = ("eval.json", "result.json", "sweep.json")
    files = [path / name for name in newest] if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _tiny_task(options: PaperFlags) -> str:
    path = options.out / "data" / "tiny-questions.jsonl"
    if not path.exists():
        report.write_json([], path)  # which makes the folder
        made = [
            {"question": f"What is {a} and 1?", "choices": [str(a + 1), str(a + 3)], "answer": 0}
            for a in range(6)
        ]
        path.write_text("".join(json.dumps(item) + "\n" for item in made))
    return str(path)
