"""Figures 6 and 10: do runs with our loss learn what runs with a naive one learn? The same seed,
the same data, 300 steps: python -m benchmarks.paper.curves.

`reference` makes all logits, as optax does (tests hold the two equal); `chunked` is exact without
them; `auto` is the kernels with their gradient filter where there is a Hopper GPU. So auto against
chunked is the filter, chunked against reference the order of sums. `curves-….json` has the largest
relative differences of the losses; the page lays the curves over each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated

from benchmarks.flags import shown
from benchmarks.measure import report
from benchmarks.paper import steps
from benchmarks.paper.plan import Step
from benchmarks.paper.steps import Experiment, PaperFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesFlags(PaperFlags):
    implementation: Annotated[tuple[str, ...], shown("NAME ...")] = ("auto", "chunked", "reference")
    """Backends of the loss."""
    steps: Annotated[int, shown("N")] = 300
    """Optimizer steps."""
    learning_rate: Annotated[float, shown("RATE")] = 2e-5
    """Peak learning rate."""
    label_smoothing: Annotated[float, shown("BETA")] = 0.1
    """β of both losses."""


def plan(options: CurvesFlags) -> Iterator[Step]:
    varied = {
        "implementation": options.implementation,
        "steps": (2 if options.tiny else options.steps,),
        "learning_rate": (options.learning_rate,),
        "label_smoothing": (options.label_smoothing,),
        "seed": options.seeds[:1],
    }
    runs = steps.grid(options, varied)
    for run in runs:
        yield run.step(tasks=())
        run.spend()
    found = compare({str(run.flags["implementation"]): run.out for run in runs if run.trained})
    report.write_json(found, options.out / f"curves-{options.group}.json")
    for row in found:
        print(
            f"{row['a']} and {row['b']}: losses of {row['steps']} steps differ by at most"
            f" {row['largest']:.2e} of themselves (step {row['step']})"
        )
    title = f"{options.model} on {options.data}: one loss, several ways"
    yield steps.page(options, "curves", title, runs)


def compare(runs: dict[str, pathlib.Path]) -> list[dict[str, object]]:
    """For each pair of runs the largest |a − b| / b of their training losses, and where it is."""
    losses = {name: _losses(path / "metrics.jsonl") for name, path in runs.items()}
    rows: list[dict[str, object]] = []
    for a, b in itertools.combinations(losses, 2):
        both = losses[a].keys() & losses[b].keys()
        apart = {step: abs(losses[a][step] - losses[b][step]) / losses[b][step] for step in both}
        worst = max(apart, key=lambda step: apart[step])
        rows.append({"a": a, "b": b, "steps": len(both), "step": worst, "largest": apart[worst]})
    return rows


def _losses(metrics: pathlib.Path) -> dict[int, float]:
    rows = map(json.loads, metrics.read_text("utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


EXPERIMENT = Experiment("curves", __doc__, CurvesFlags, plan)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
