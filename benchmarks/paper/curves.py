"""Figures 6 and 10: do runs with our loss learn what runs with a naive one learn? The same seed,
the same data, 300 steps: python -m benchmarks.paper.curves.

`reference` makes all logits, as optax does (tests hold the two equal); `chunked` is exact without
them; `fp8` and `filter` are the kernels where there is a Hopper GPU, with what the trainer takes
unless told otherwise and with the library's gradient filter. So fp8 and filter against chunked are
what these leave out, chunked against reference is the order of sums. `curves-….json` has the
largest relative differences of the losses; the page lays the curves over each other.
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
from benchmarks.paper.steps import Experiment, PaperFlags, Run

WAYS: dict[str, dict[str, object]] = {
    "fp8": {"gradient_filter": "fp8"},
    "filter": {"gradient_filter": "auto"},
    "chunked": {"implementation": "chunked"},
    "reference": {"implementation": "reference"},
}
"""The flags of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesFlags(PaperFlags):
    ways: Annotated[tuple[str, ...], shown(f"{{{','.join(WAYS)}}} ...")] = tuple(WAYS)
    """To make the loss and its gradients."""
    steps: Annotated[int, shown("N")] = 300
    """Optimizer steps."""
    learning_rate: Annotated[float, shown("RATE")] = 2e-5
    """Peak learning rate."""
    label_smoothing: Annotated[float, shown("BETA")] = 0.1
    """β of each loss."""

    def check(self) -> None:
        super().check()
        for name in self.ways:
            if name not in WAYS:
                raise ValueError(f"--ways {name}: must be of {', '.join(WAYS)}")


def plan(options: CurvesFlags) -> Iterator[Step]:
    runs: dict[str, Run] = {}
    for name in options.ways:
        varied = {
            **{flag: (value,) for flag, value in WAYS[name].items()},
            "steps": (2 if options.tiny else options.steps,),
            "learning_rate": (options.learning_rate,),
            "label_smoothing": (options.label_smoothing,),
            "seed": options.seeds[:1],
        }
        (runs[name],) = steps.grid(options, varied)
        yield runs[name].step(tasks=())
        runs[name].spend()
    found = compare({name: run.out for name, run in runs.items() if run.trained})
    report.write_json(found, options.out / f"curves-{options.group}.json")
    for row in found:
        print(
            f"{row['a']} and {row['b']}: losses of {row['steps']} steps differ by at most"
            f" {row['largest']:.2e} of themselves (step {row['step']})"
        )
    title = f"{options.model} on {options.data}: one loss, several ways"
    yield steps.page(options, "curves", title, runs.values())


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
