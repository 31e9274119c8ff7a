"""Appendix B.4: calibration against β, from 0 to 0.5: python -m benchmarks.paper.betas.

At one learning rate: give the one that `table1` chose, whose runs are then among these.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated

from benchmarks.flags import shown
from benchmarks.paper import steps
from benchmarks.paper.plan import Step
from benchmarks.paper.steps import Experiment, PaperFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class BetasFlags(PaperFlags):
    learning_rate: Annotated[float, shown("RATE")] = 2e-5
    """Peak learning rate."""
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0, 0.1, 0.2, 0.3, 0.4, 0.5)
    """β of each run."""


def plan(options: BetasFlags) -> Iterator[Step]:
    varied = {
        "learning_rate": (options.learning_rate,),
        "label_smoothing": options.label_smoothing,
    }
    return steps.swept(options, "betas", f"{options.model} on {options.data}: β", varied)


EXPERIMENT = Experiment("betas", __doc__, BetasFlags, plan)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
