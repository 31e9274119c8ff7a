"""Table 1, Figures 1, 2, 8, 9: calibration before and after fine-tuning, with smoothing and
without: python -m benchmarks.paper.table1.

Each learning rate is tried with the first seed; the one with the least held-out NLL, for each β by
itself, is run with the other seeds. The model before and these runs are evaluated at every task.
For the unsmoothed ones a temperature is fitted on other questions, beside smoothing: what people do
instead.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated

from benchmarks.flags import shown
from benchmarks.paper import steps
from benchmarks.paper.plan import Step
from benchmarks.paper.steps import Experiment, PaperFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table1Flags(PaperFlags):
    learning_rate: Annotated[tuple[float, ...], shown("RATE ...")] = (5e-6, 2e-5, 5e-5, 2e-4)
    """The paper's."""
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0.0, 0.1)
    """β of each run."""


def plan(options: Table1Flags) -> Iterator[Step]:
    """The steps; those behind the choice of learning rates are known when it is made."""
    common = steps.training(options)
    first, *others = options.seeds
    rates = (1e-3,) if options.tiny else options.learning_rate
    choice = options.out / "choice"
    yield steps.sweep(
        "every learning rate",
        choice,
        common
        | {
            "learning_rate": rates,
            "label_smoothing": options.label_smoothing,
            "seed": (first,),
        },
    )
    best = chosen(choice)
    models = {f"choice/{name}": choice / name for name in best.values()}
    for beta, name in best.items():
        rate = steps.read(choice / name / "run.json")["learning_rate"]
        same = common | {"label_smoothing": (beta,), "learning_rate": (rate,)}
        for seed in others:
            out = options.out / "seeds" / f"{name},seed={seed}"
            yield steps.single(f"{name}, seed {seed}", out, same | {"seed": (seed,)})
            if (out / "eval.json").is_file():
                models[f"seeds/{out.name}"] = out
    before = {} if options.tiny else {f"before/{options.model}": options.model}
    results = [choice, *(path for path in models.values() if path.parent != choice)]
    for result, step in steps.evaluations(options, before | models):
        results.append(result)
        yield step
    title = f"{options.model} on {options.data}, before and after fine-tuning"
    yield steps.page(options, title, results)


def chosen(choice: pathlib.Path) -> dict[float, str]:
    """For each β the run with the least NLL of held-out tokens, without smoothing in it."""
    best: dict[float, tuple[float, str]] = {}
    for path in steps.runs(choice).values():
        nll = steps.read(path / "eval.json")["tokens"]["nll"]
        beta = steps.read(path / "run.json")["label_smoothing"]
        if nll < best.get(beta, (math.inf, ""))[0]:
            best[beta] = (nll, path.name)
    return {beta: name for beta, (_, name) in best.items()}


EXPERIMENT = Experiment("table1", __doc__, Table1Flags, plan)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
