"""Figure 5: fine-tuning a large vocabulary with and without a softcap on its logits:
python -m benchmarks.paper.softcap.

A softcap on a model that was trained without one is a change that fine-tuning has to make good.
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
class SoftcapFlags(PaperFlags):
    model: Annotated[str, shown("MODEL")] = "gemma3-270m"
    """What is fine-tuned."""
    softcap: Annotated[tuple[str, ...], shown("CAP ...")] = ("None", "30", "15")
    """None: no cap."""
    learning_rate: Annotated[float, shown("RATE")] = 2e-5
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0.0, 0.1)


def plan(options: SoftcapFlags) -> Iterator[Step]:
    out = options.out / "runs"
    yield steps.sweep(
        "every softcap",
        out,
        steps.training(options)
        | {
            "softcap": options.softcap,
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
    yield steps.page(options, f"{options.model} on {options.data}: softcaps", shown_there)


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("paper.softcap", parse, make, arguments)


def parse(arguments: Sequence[str] | None = None) -> SoftcapFlags:
    return steps.parse(SoftcapFlags, "softcap", __doc__, arguments)


def make(options: SoftcapFlags) -> int:
    return work(plan(options), options.out, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
