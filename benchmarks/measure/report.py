"""What was measured: rows that explain themselves, their JSON, and their table on a terminal."""

import dataclasses
import json
import os
import pathlib
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.implementations.settings import Run, run_from_json


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. Times in ms, memory in MB of 2^20 bytes beyond the call's arguments."""

    run: Run
    backend: str
    """Which kernel ran: what "auto" chose, or the implementation itself."""
    case: str
    n: int
    d: int
    v: int
    dtype: str
    inputs: str
    loss: float
    """The mean loss in nats, so that rows can be seen to compute the same thing."""
    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    launches: int
    temporary_mb: float | None
    """None where the framework can't tell (torch on a CPU)."""
    output_mb: float | None
    extra_mb: float | None
    tflops: float
    """The rate of the loss's 1 (fwd) or 3 (fwdbwd) matrix products, at the median time."""
    matmul_ms: float
    """Median of the bare product E·Cᵀ, timed in turn with it."""
    matmul_ratio: float
    """p50_ms / matmul_ms."""
    matmul_share: float
    """TFLOP/s as a share of the bare product's."""
    device: str
    framework: str
    """Name and version."""
    python: str
    commit: str
    time: str
    """UTC, ISO 8601."""
    hidden_error: float | None = None
    """‖dE − exact‖ / ‖exact‖, where it was asked for."""
    head_error: float | None = None
    """‖dC − exact‖ / ‖exact‖, where it was asked for."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A run that was not measured, and why."""

    run: Run
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __add__(self, other: "Report") -> "Report":
        return Report(self.rows + other.rows, self.skipped + other.skipped)


def write(report: Report, path: pathlib.Path) -> None:
    """Writes the report as JSON."""
    write_json(dataclasses.asdict(report), path)


def write_json(value: Any, path: pathlib.Path) -> None:
    """Writes a file, making the folder it goes into. Cut off, it leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(whole, path)


def read(path: pathlib.Path) -> Report:
    """Reads what `write` wrote. ValueError where the file holds something else."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        return Report(
            tuple(Row(**{**row, "run": run_from_json(row["run"])}) for row in fields["rows"]),
            tuple(Skipped(run_from_json(s["run"]), s["reason"]) for s in fields["skipped"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a benchmark report: {error}") from error


def of_one_device(report: Report) -> Report:
    """The report again; ValueError where devices differ, whose times make no ratio."""
    devices = sorted({row.device for row in report.rows})
    if len(devices) > 1:
        raise ValueError(f"rows of one device are wanted, not of {'; '.join(devices)}")
    return report


def show(report: Report, console: Console | None = None) -> None:
    """Prints the rows as a table, and a line for each run that was skipped."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 140
    if report.rows:
        first = report.rows[0]
        console.print(
            f"{first.case}: N, D, V = {first.n}, {first.d}, {first.v}, {first.dtype}, "
            f"{first.inputs} inputs; {first.device}, {first.framework}, commit {first.commit}; "
            f"bare matmul {matmul_ms(report):.3g} ms",
            highlight=False,
        )
        table = Table(box=None, header_style="bold")
        for column in ("implementation", "mode", "options"):
            table.add_column(column, no_wrap=True)
        for column in ("p20 ms", "p50 ms", "p80 ms", "× matmul", "extra MB", "TFLOP/s", "share"):
            table.add_column(column, justify="right")
        for column in ("loss", "dE error", "dC error"):
            table.add_column(column, justify="right")
        for row in report.rows:
            table.add_row(*_cells(row))
        console.print(table)
    for line in dict.fromkeys(
        f"skipped {skipped.run.implementation} {options(skipped.run)}: {skipped.reason}"
        for skipped in report.skipped
    ):
        console.print(line, markup=False, highlight=False)


def matmul_ms(report: Report) -> float:
    """The bare product's time over all rows."""
    return statistics.median(row.matmul_ms for row in report.rows)


def _cells(row: Row) -> list[str]:
    run = row.run
    name = run.implementation
    if row.backend != name:
        name += f" → {row.backend}"
    return [
        name,
        run.mode,
        options(run),
        *(f"{ms:.4g}" for ms in (row.p20_ms, row.p50_ms, row.p80_ms)),
        f"{row.matmul_ratio:.2f}",
        "–" if row.extra_mb is None else f"{row.extra_mb:,.1f}",
        f"{row.tflops:.3g}",
        f"{row.matmul_share:.0%}",
        f"{row.loss:.4f}",
        *("–" if error is None else f"{error:.2g}" for error in (row.hidden_error, row.head_error)),
    ]


def options(run: Run) -> str:
    """The run's options in short: `β=0.1 softcap=30 filter=exact ordered stats`."""
    settings = run.settings
    parts = [f"β={settings.label_smoothing:g}"]
    if settings.softcap is not None:
        parts.append(f"softcap={settings.softcap:g}")
    if settings.gradient_filter != "auto":
        name = settings.gradient_filter
        parts.append(f"filter={'exact' if name is None else name}")
    if settings.precision is not None:
        parts.append(f"precision={settings.precision}")
    parts += [
        word for word, on in (("ordered", settings.vocab_order), ("stats", settings.stats)) if on
    ]
    return " ".join(parts)
