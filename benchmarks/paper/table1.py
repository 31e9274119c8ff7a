"""Table 1, Figures 1, 2, 8, 9: calibration before and after fine-tuning, with smoothing and
without: python -m benchmarks.paper.table1.

Each learning rate is tried with the first seed; the one with the least held-out NLL, for each β by
itself, is run with the other seeds. The model before and these runs are evaluated at every task.
Beside smoothing there is what people do instead: a temperature that is fitted on other questions,
and with `--penalties` two losses that others put in its place.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from benchmarks.flags import shown
from benchmarks.paper import penalties, steps
from benchmarks.paper.plan import Step
from benchmarks.paper.steps import Experiment, PaperFlags, Run
from train.models.config import SHAPES
from train.run import folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table1Flags(PaperFlags):
    learning_rate: Annotated[tuple[float, ...], shown("RATE ...")] = (5e-6, 2e-5, 5e-5, 2e-4)
    """The paper's."""
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0.0, 0.1)
    """β of each run."""
    penalties: Annotated[tuple[str, ...], shown("{maxsup,confidence-penalty} ...", "none")] = ()
    """In place of smoothing, each with the largest β. They make all logits, several times 32 · 512
    tokens by the vocabulary in float32: --rows 8 for a large one."""

    def check(self) -> None:
        super().check()
        for name in self.penalties:
            if name not in penalties.MODULES:
                raise ValueError(f"--penalties {name}: must be of {', '.join(penalties.MODULES)}")
        if self.penalties and not max(self.label_smoothing) > 0:
            raise ValueError("--penalties have the largest --label-smoothing for β, which is 0")


def plan(options: Table1Flags) -> Iterator[Step]:
    """The steps; those behind the choice of learning rates are known when it is made.

    With one seed everything is compared before another seed is begun.
    """
    if not options.tiny and options.model not in SHAPES:  # which begin with random weights
        yield from steps.evaluations(options, options.model, steps.before(options))
    runs: list[Run] = []
    chosen: list[tuple[Arm, Run]] = []
    for arm in arms(options):
        tried = arm.runs(options, options.learning_rate, options.seeds[0])
        for run in tried:
            yield run.step(tasks=())
            best = least_nll(tried)
            for other in tried:
                if other is not best:
                    other.spend()
        runs += tried
        if best := least_nll(tried):
            chosen.append((arm, best))
            yield from steps.judged(best)
    for seed in options.seeds[1:]:
        for arm, best in chosen:
            (run,) = arm.runs(options, (best.flags["learning_rate"],), seed)
            runs.append(run)
            yield from steps.judged(run)
    title = f"{options.model} on {options.data}, before and after fine-tuning"
    yield steps.page(options, "table1", title, runs, steps.before(options))


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the ways to train that the table compares."""

    flags: Mapping[str, object]
    module: str = steps.TRAIN

    def runs(self, options: PaperFlags, rates: Sequence[object], seed: int) -> list[Run]:
        own = {field: (value,) for field, value in self.flags.items()}
        varied = {"learning_rate": rates, **own, "seed": (seed,)}
        return steps.grid(options, varied, self.module)


def arms(options: Table1Flags) -> list[Arm]:
    smoothed = [Arm({"label_smoothing": beta}) for beta in options.label_smoothing]
    weight = max(options.label_smoothing)
    return smoothed + [
        Arm({"implementation": name, "label_smoothing": weight}, penalties.__name__ + ".__main__")
        for name in options.penalties
    ]


def least_nll(tried: Sequence[Run]) -> Run | None:
    """The finished run with the least NLL of held-out tokens, without smoothing in it."""
    finished = [run for run in tried if run.trained]
    return min(
        finished,
        key=lambda run: steps.read(run.out / folder.EVALUATION)["tokens"]["nll"],
        default=None,
    )


EXPERIMENT = Experiment("table1", __doc__, Table1Flags, plan)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
