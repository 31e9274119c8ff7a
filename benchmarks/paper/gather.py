"""What experiments found, small enough to commit: python -m benchmarks.paper.gather.

Of the folder that experiments share it takes flags, losses, evaluations and `steps.json`, and
leaves weights and answers behind. From the answers it makes what no GPU is needed for: intervals,
where `--resamples 0` made none, and on the same questions each smoothed model less the one at β = 0
of the same seed, and that one less the model before. Then it makes the pages of each MODEL-DATA:
Table 1's, and one of each other experiment that there are runs of. It needs no weights, works on
what an experiment that time cut off has left, and may be called again.

What it made is itself a folder that experiments go on in: copied to their --out, all that is done
stays done, and a later call takes what was measured before as it is, for want of its answers. A
difference needs those of both sides, and is said where it cannot be made.
"""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m benchmarks.paper.gather")  # the imports below take a second

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.paper import headline
from benchmarks.paper.plan import RECORD
from benchmarks.paper.table1 import Table1Flags
from train import files, report
from train.evaluation import answers, asking, page_entries, paired, results
from train.run import folder

KEPT = (folder.RUN_FILE, folder.METRICS, folder.EVALUATION)
"""Of a run."""
BEFORE = "before"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatherFlags:
    """From where to where."""

    found: Annotated[pathlib.Path, shown("FOLDER")] = pathlib.Path("runs/paper")
    """The experiments' --out."""
    out: Annotated[pathlib.Path, shown("FOLDER")] = pathlib.Path("benchmarks/paper/results")
    """Where it goes."""
    resamples: Annotated[int, shown("N")] = 1000
    """Of the bootstrap."""

    def check(self) -> None:
        """ValueError for a folder without experiments."""
        if not (self.found / RECORD).is_file():
            raise ValueError(f"--found {self.found} holds no experiments: there is no {RECORD}")
        if self.resamples < 1:
            raise ValueError(f"--resamples must be at least 1, not {self.resamples}")


def gather(options: GatherFlags) -> int:
    """Copies, measures and renders. 0, or the status of the page that could not be made."""
    for file in (options.found / RECORD, *options.found.glob("curves-*.json")):
        _copy(options.found, options.out, file.name)
    runs = sorted(path.parent for path in options.found.glob(f"runs/*/*/{folder.RUN_FILE}"))
    for run in runs:
        for name in KEPT:
            _copy(options.found, options.out, str((run / name).relative_to(options.found)))
    there = sorted(path.parent for path in options.found.glob(f"evaluations/*/*/{results.RESULT}"))
    measure = functools.partial(_measured, resamples=options.resamples)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as cores:  # XLA sorts on one
        measured = dict(zip(there, cores.map(measure, there), strict=True))
    for path, result in measured.items():
        other = _compared_with(path, measured)
        if other is not None:
            result = _paired(path, result, other, options.resamples)
        made = options.out / path.relative_to(options.found) / results.RESULT
        made.parent.mkdir(parents=True, exist_ok=True)
        results.write(made, result)
        files.write(made, _anywhere(_close(made.read_text("utf-8")), options.found))
        print(made, flush=True)
    groups = sorted({run.parent.name for run in runs})
    return max((_pages(group, options) for group in groups), default=0)


def _copy(found: pathlib.Path, out: pathlib.Path, name: str) -> None:
    if (found / name).is_file():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        files.write(out / name, _anywhere((found / name).read_text("utf-8"), found))


def _close(text: str) -> str:
    """JSON without the space that people want, which is nearly half of an evaluation."""
    return json.dumps(json.loads(text), separators=(",", ":")) + "\n"


def _anywhere(text: str, found: pathlib.Path) -> str:
    """Without the folder that the experiments' own paths began in, on whatever machine."""
    for run in found.glob(f"runs/*/*/{folder.RUN_FILE}"):
        told = json.loads(run.read_text("utf-8"))
        shared = pathlib.Path(told["out"]).parents[2]
        for path in told["data"]:
            within = str(shared / "data" / pathlib.Path(path).name)
            if path != within and path.endswith(f"/{within}"):
                text = text.replace(path.removesuffix(within), "")
    return text


def _measured(path: pathlib.Path, resamples: int) -> results.Result:
    """The evaluation in a folder, with intervals for the tasks that have none."""
    result = results.read(path)
    how = {"resamples": resamples, "seed": result.seed}
    tasks, settings = dict(result.tasks), result.settings
    for name, task in result.tasks.items():
        if _has_intervals(task):
            continue
        if not _answered(path, task):
            print(f"{path}: no intervals at {name}, for want of answers")
            continue
        mine = _answers(path / task.items, task.questions)
        made = dataclasses.replace(task, scorings=asking.scored(mine, task.answer, **how))
        if fitted := task.scorings[task.reported].temperature:
            file = (path / task.items).with_suffix(".temperature.jsonl")
            others = _answers(file, fitted.n)
            made = asking.with_temperature(made, mine, others, fitted.fitted_on, **how)
        tasks[name], settings = made, result.settings | {"resamples": resamples}
    return dataclasses.replace(result, tasks=tasks, settings=settings)


def _has_intervals(task: results.TaskResult) -> bool:
    return task.scorings[task.reported].measures["accuracy"].low is not None


def _answered(path: pathlib.Path, task: results.TaskResult) -> bool:
    """Whether the answers are there, and not what was made of them alone."""
    return (path / task.items).is_file()


def _answers(path: pathlib.Path, questions: int) -> answers.Answers:
    _, lines, _ = answers.read(path)
    if len(lines) != questions:
        raise ValueError(f"{path} answers {len(lines)} questions, and its result {questions}")
    return answers.Answers.of(lines)


def _compared_with(
    path: pathlib.Path, measured: dict[pathlib.Path, results.Result]
) -> pathlib.Path | None:
    """The evaluation that one is compared with: of a smoothed run that at β = 0 of the same seed,
    of one at β = 0 that of the model before.

    Where several learning rates were evaluated at β = 0, as a choice among more of them may leave
    it, the one whose run has the least NLL of held-out tokens.
    """
    own = measured[path].flags
    if not own:
        return None
    if not own["label_smoothing"]:
        before = path.parents[1] / BEFORE / pathlib.Path(own["model"]).name
        return before if before in measured else None
    plain = [
        other
        for other, result in measured.items()
        if other.parent == path.parent
        and result.label_smoothing == 0
        and result.flags["seed"] == own["seed"]
        and result.flags["softcap"] == own["softcap"]
        and result.flags["model"] == own["model"]
    ]
    return min(plain, key=_held_out_nll, default=None)


def _held_out_nll(evaluation: pathlib.Path) -> float:
    run = evaluation.parents[2] / "runs" / evaluation.parent.name / evaluation.name
    return json.loads((run / folder.EVALUATION).read_text("utf-8"))["tokens"]["nll"]


def _paired(
    path: pathlib.Path, result: results.Result, where: pathlib.Path, resamples: int
) -> results.Result:
    """With the differences from another model, whose evaluation is there."""
    other = results.read(where)
    tasks = dict(result.tasks)
    for name in sorted(result.tasks.keys() & other.tasks.keys()):
        task = result.tasks[name]
        if _answered(path, task) and _answered(where, other.tasks[name]):
            mine = _answers(path / task.items, task.questions)
            how = {"resamples": resamples, "seed": result.seed}
            tasks[name] = paired.against(task, mine, other, where, **how)
        elif task.against is None:
            print(f"{path}: no difference from {where} at {name}, for want of answers")
    return dataclasses.replace(result, tasks=tasks)


Flags = Mapping[str, Any]


def _of_table1(run: Flags) -> bool:
    return _smoothed(run) and run["label_smoothing"] in Table1Flags().label_smoothing


def _smoothed(run: Flags) -> bool:
    return run["steps"] is None and run["softcap"] is None and run["implementation"] == "auto"


EXPERIMENTS: dict[str, tuple[str, Callable[[Flags], bool]]] = {
    "": ("before and after", _of_table1),
    "-betas": ("β", lambda run: _smoothed(run) and not _of_table1(run)),
    "-softcap": ("softcaps", lambda run: run["softcap"] is not None),
    "-penalties": (
        "what others do in place of smoothing",
        lambda run: run["steps"] is None and run["implementation"] != "auto",
    ),
    "-curves": ("one loss, several ways", lambda run: run["steps"] is not None),
}
"""By the end of a page's name: what the page is about, and the runs that it is of. Those of Table 1
with the same learning rates are shown beside them, but for curves, which are compared by
themselves."""


def _pages(group: str, options: GatherFlags) -> int:
    """Reports of the runs of MODEL-DATA, each with its few numbers."""
    runs = {
        path.parent: json.loads(path.read_text("utf-8"))
        for path in sorted((options.out / "runs" / group).glob(f"*/{folder.RUN_FILE}"))
    }
    pages = {
        name: [run for run, told in runs.items() if belongs(told)]
        for name, (_, belongs) in EXPERIMENTS.items()
    }
    status, table1 = 0, tuple(pages[""])
    for name, own in reversed(pages.items()):
        if name and not any((run / folder.EVALUATION).is_file() for run in own):
            pages[""] += own  # where they are listed as not finished
        elif own:
            rates = {runs[run]["learning_rate"] for run in own if name != "-curves"}
            more = [run for run in table1 if runs[run]["learning_rate"] in rates]
            shown = {run: runs[run] for run in sorted({*own, *more})}
            # A run that does not say had what was the default then.
            filters = sorted({told.get("gradient_filter", "auto") for told in shown.values()})
            title = f"Fine-tuning {group.replace('-', ' ')}: {EXPERIMENTS[name][0]}"
            title += f", with --gradient-filter {' and '.join(filters)}"
            status = max(status, _page(f"{group}{name}", title, shown, options))
    return status


def _page(name: str, title: str, runs: Mapping[pathlib.Path, Flags], options: GatherFlags) -> int:
    """The report of runs, their evaluations, and those of the models before them."""
    evaluated = options.out / "evaluations"
    models = sorted({pathlib.Path(told["model"]).name for told in runs.values()})
    shown = [evaluated / BEFORE / model for model in models]
    for run in runs:
        shown += [run, evaluated / run.parent.name / run.name]
    there = list(filter(pathlib.Path.exists, shown))
    entries, _ = page_entries.read(there)
    if few := headline.table(entries):
        files.write(options.out / f"{name}-headline.md", few)
    given = [*map(str, there), "--title", title]
    return report.main([*given, "--out", str(options.out / f"{name}.html")])


def parse(arguments: Sequence[str] | None = None) -> GatherFlags:
    return flags.parse(GatherFlags, "paper.gather", __doc__, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("paper.gather", parse, gather, arguments)


if __name__ == "__main__":
    sys.exit(main())
