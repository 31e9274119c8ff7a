"""Appendix B.4: calibration against β, from 0 to 0.5: python -m benchmarks.paper.betas.

At one learning rate: the one that `table1` chose, or what is given.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.paper import steps
from benchmarks.paper.plan import Step, work
from benchmarks.paper.steps import PaperFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class BetasFlags(PaperFlags):
    learning_rate: Annotated[float, shown("RATE")] = 2e-5
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0, 0.1, 0.2, 0.3, 0.4, 0.5)


def plan(options: BetasFlags) -> Iterator[Step]:
    out = options.out / "runs"
    yield steps.sweep(
        "every β",
        out,
        steps.training(options)
        | {
            "learning_rate": (options.learning_rate,),
            "label_smoothing": options.label_smoothing,
            "seed": options.seeds,
        },
    )
    models = steps.runs(out)
    shown_there = [out]
    for result, step in steps.evaluations(options, models):
        shown_there.append(result)
        yield step
    yield steps.page(options, f"{options.model} on {options.data}: β", shown_there)


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("paper.betas", parse, make, arguments)


def parse(arguments: Sequence[str] | None = None) -> BetasFlags:
    return steps.parse(BetasFlags, "betas", __doc__, arguments)


def make(options: BetasFlags) -> int:
    return work(plan(options), options.out, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
