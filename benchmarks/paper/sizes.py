"""Figures 3 and 7: calibration against the size of a model: python -m benchmarks.paper.sizes.

nano, tiny and small (D = 64, 128, 512, over one vocabulary of 8,192) are trained from scratch: a
family that differs in size alone, but far below the paper's, and not instruction tuning of a
pretrained model. What smoothing does along it says how hidden size acts, not how large models
behave. SmolLM2 135M and Gemma 3 270M, in `table1`, are no family: they differ in data, vocabulary
and design as well, so nothing about size follows from that pair.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated

import tyro

from benchmarks.flags import shown
from benchmarks.paper import steps
from benchmarks.paper.plan import Step
from benchmarks.paper.steps import Experiment, PaperFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizesFlags(PaperFlags):
    model: Annotated[str, tyro.conf.Suppress] = "from-scratch"
    """In the names of folders."""
    sizes: Annotated[tuple[str, ...], shown("MODEL ...")] = ("nano", "tiny", "small")
    """Shapes that are trained from scratch."""
    learning_rate: Annotated[float, shown("RATE")] = 1e-3
    """Peak learning rate."""
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0.0, 0.1)
    """β of each run."""
    tasks: Annotated[tuple[str, ...], shown("TASK ...")] = ("arc-easy",)
    """What is evaluated besides the held-out records; such models guess."""


def plan(options: SizesFlags) -> Iterator[Step]:
    varied = {
        "model": options.sizes[:1] if options.tiny else options.sizes,
        "learning_rate": (options.learning_rate,),
        "label_smoothing": options.label_smoothing,
    }
    return steps.swept(options, "sizes", f"Sizes from scratch on {options.data}", varied)


EXPERIMENT = Experiment("sizes", __doc__, SizesFlags, plan)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
