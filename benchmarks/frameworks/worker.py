"""One framework's process: python -m benchmarks.frameworks.worker jax FOLDER.

`benchmarks.table` starts one such process a framework, so that JAX and PyTorch never share a GPU's
memory. The folder holds `inputs.npz`, the same for all, and `jax-plan.json`; it receives
`jax-report.json`, after each row, and the exact gradients that the first process makes for all.
"""

import dataclasses
import json
import pathlib
import sys
from typing import get_args

from benchmarks.implementations import FrameworkName
from benchmarks.implementations.settings import Run, run_from_json
from benchmarks.inputs import arrays
from benchmarks.measure import errors, report, runner

FRAMEWORKS: tuple[FrameworkName, ...] = get_args(FrameworkName)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one process is to measure."""

    case: str
    runs: tuple[Run, ...]
    seconds: float
    commit: str
    last: bool = True
    """Whether no other process follows that would need the exact gradients."""


def write_plan(plan: Plan, framework: str, folder: pathlib.Path) -> None:
    path = folder / f"{framework}-plan.json"
    path.write_text(json.dumps(dataclasses.asdict(plan)))


def read_plan(framework: str, folder: pathlib.Path) -> Plan:
    fields = json.loads((folder / f"{framework}-plan.json").read_text())
    return Plan(**{**fields, "runs": tuple(map(run_from_json, fields["runs"]))})


def report_path(framework: str, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{framework}-report.json"


def work(framework: str, folder: pathlib.Path) -> None:
    """Measures the framework's plan; a framework that cannot be imported skips all of it."""
    plan = read_plan(framework, folder)
    data = arrays.load(folder / "inputs.npz")
    try:
        if framework == "jax":
            from benchmarks.frameworks.jax import JaxFramework as Held
        else:
            from benchmarks.frameworks.torch import TorchFramework as Held
    except ImportError as error:
        reason = runner.failure(error, (framework,))
        measured = report.Report(skipped=tuple(report.Skipped(run, reason) for run in plan.runs))
    else:
        measured = runner.measure_runs(
            Held(data),
            data,
            plan.case,
            plan.runs,
            seconds=plan.seconds,
            commit=plan.commit,
            reference=errors.Reference(
                folder, data, compute=framework == "jax", keep=not plan.last
            ),
            announce=lambda line: print(f"  {line} …", file=sys.stderr, flush=True),
            save=lambda measured: report.write(measured, report_path(framework, folder)),
        )
    report.write(measured, report_path(framework, folder))


if __name__ == "__main__":
    work(sys.argv[1], pathlib.Path(sys.argv[2]))
