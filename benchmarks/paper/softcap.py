"""Figure 5: fine-tuning a large vocabulary with and without a softcap on its logits:
python -m benchmarks.paper.softcap.

A softcap on a model that was trained without one is a change that fine-tuning has to make good.
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
class SoftcapFlags(PaperFlags):
    model: Annotated[str, shown("MODEL")] = "gemma3-270m"
    """What is fine-tuned."""
    softcap: Annotated[tuple[str, ...], shown("CAP ...")] = ("None", "30", "15")
    """None: the model as it is, a run that `betas` and `table1` may have made."""
    learning_rate: Annotated[float, shown("RATE")] = 2e-5
    """Peak learning rate."""
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0.0, 0.1)
    """β of each run."""


def plan(options: SoftcapFlags) -> Iterator[Step]:
    varied = {
        "softcap": options.softcap,
        "learning_rate": (options.learning_rate,),
        "label_smoothing": options.label_smoothing,
    }
    title = f"{options.model} on {options.data}: softcaps"
    return steps.swept(options, "softcap", title, varied)


EXPERIMENT = Experiment("softcap", __doc__, SoftcapFlags, plan)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
