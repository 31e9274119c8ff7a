"""All experiments of a model, what says most first: python -m benchmarks.paper.everything.

Table 1 on both sets of instructions, curves, β at the rate that Table 1 chose, what others do in
place of smoothing, and softcaps, the last with the first seed alone. With `--minutes` it is what a
machine that is lent is given to do, again and again, until it is done.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from benchmarks.paper import betas, curves, penalties, softcap, steps, table1
from benchmarks.paper.plan import Step
from benchmarks.paper.published import INSTRUCTIONS
from benchmarks.paper.steps import Experiment, PaperFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverythingFlags(PaperFlags):
    data: Annotated[str, tyro.conf.Suppress] = "alpaca"
    """What all but Table 1 are trained on."""

    def but[F: PaperFlags](self, kind: type[F], **own: Any) -> F:
        """The flags of one of the experiments: these, and its own."""
        shared: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(PaperFlags)
        }
        return kind(**shared | own)


def plan(options: EverythingFlags) -> Iterator[Step]:
    names = sorted(INSTRUCTIONS) if not options.tiny else [options.data]
    tables = [options.but(table1.Table1Flags, data=name) for name in names]
    for table in tables:
        steps.prepare(table)
    for table in tables:
        yield from table1.plan(table)
    yield from curves.plan(options.but(curves.CurvesFlags))
    if (rate := _chosen(tables[0])) is not None:
        yield from betas.plan(options.but(betas.BetasFlags, learning_rate=rate))
    # They make all logits: with a quarter of the rows at a time any vocabulary has room.
    others = options.but(table1.Table1Flags, penalties=tuple(penalties.MODULES), rows=8)
    yield from table1.plan(others)
    capped = options.but(softcap.SoftcapFlags, seeds=options.seeds[:1])
    if rate is not None:
        capped = dataclasses.replace(capped, learning_rate=rate)
    yield from softcap.plan(capped)


def _chosen(table: table1.Table1Flags) -> float | None:
    """The learning rate of Table 1's smoothed runs, None before it has any."""
    smoothed = table1.arms(table)[-1]
    best = table1.least_nll(smoothed.runs(table, table.learning_rate, table.seeds[0]))
    return None if best is None else float(str(best.flags["learning_rate"]))


EXPERIMENT = Experiment("everything", __doc__, EverythingFlags, plan)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
