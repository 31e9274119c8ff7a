"""What experiments found, small enough to commit: python -m benchmarks.paper.gather.

Of the folder that experiments share it takes flags, losses, evaluations and `steps.json`, and
leaves weights and answers behind. From the answers it makes what no GPU is needed for: intervals,
where `--resamples 0` made none, and on the same questions each smoothed model less the one at β = 0
of the same seed, and that one less the model before. Then it makes a page of each MODEL-DATA. It
needs no weights, works on what an experiment that time cut off has left, and may be called again.
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
from collections.abc import Sequence
from typing import Annotated

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.paper import headline
from benchmarks.paper.plan import RECORD
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
    _copy(options.found, options.out, RECORD)
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
        result = result if other is None else _paired(path, result, other, options.resamples)
        made = options.out / path.relative_to(options.found) / results.RESULT
        made.parent.mkdir(parents=True, exist_ok=True)
        results.write(made, result)
        files.write(made, _anywhere(made.read_text("utf-8"), options.found))
        print(made, flush=True)
    groups = sorted({run.parent.name for run in runs})
    return max((_page(group, options) for group in groups), default=0)


def _copy(found: pathlib.Path, out: pathlib.Path, name: str) -> None:
    if (found / name).is_file():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        files.write(out / name, _anywhere((found / name).read_text("utf-8"), found))


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
    """The evaluation in a folder, with intervals if it has none."""
    result = results.read(path)
    if result.settings["resamples"]:
        return result
    how = {"resamples": resamples, "seed": result.seed}
    tasks = {}
    for name, task in result.tasks.items():
        mine = _answers(path / task.items, task.questions)
        made = dataclasses.replace(task, scorings=asking.scored(mine, task.answer, **how))
        if fitted := task.scorings[task.reported].temperature:
            file = (path / task.items).with_suffix(".temperature.jsonl")
            others = _answers(file, fitted.n)
            made = asking.with_temperature(made, mine, others, fitted.fitted_on, **how)
        tasks[name] = made
    settings = result.settings | {"resamples": resamples}
    return dataclasses.replace(result, tasks=tasks, settings=settings)


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
    for name in result.tasks.keys() & other.tasks.keys():
        task = result.tasks[name]
        mine = _answers(path / task.items, task.questions)
        how = {"resamples": resamples, "seed": result.seed}
        tasks[name] = paired.against(task, mine, other, where, **how)
    return dataclasses.replace(result, tasks=tasks)


def _page(group: str, options: GatherFlags) -> int:
    """The report of all runs of MODEL-DATA and of the model before them, and its few numbers."""
    shown: list[pathlib.Path] = []
    runs = sorted((options.out / "runs" / group).iterdir())
    for model in sorted({json.loads((r / folder.RUN_FILE).read_text())["model"] for r in runs}):
        shown.append(options.out / "evaluations" / BEFORE / pathlib.Path(model).name)
    for run in runs:
        shown += [run, options.out / "evaluations" / group / run.name]
    title = f"Fine-tuning {group.replace('-', ' ')}, before and after"
    there = list(filter(pathlib.Path.exists, shown))
    entries, _ = page_entries.read(there)
    files.write(options.out / f"{group}-headline.md", headline.table(entries))
    given = [*map(str, there), "--title", title]
    return report.main([*given, "--out", str(options.out / f"{group}.html")])


def parse(arguments: Sequence[str] | None = None) -> GatherFlags:
    return flags.parse(GatherFlags, "paper.gather", __doc__, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("paper.gather", parse, gather, arguments)


if __name__ == "__main__":
    sys.exit(main())
