"""The loss beside naive optax at every case and N: python -m benchmarks.everywhere.

What a user gets who changes nothing must never be slower than what they had, nor need much memory;
--gradient-filter and --precision are for those who do change something.
Inputs are drawn with the column statistics of real models (`benchmarks.inputs.like_models`), or are
a real model's where `--real` names a folder of them. Writes JSON and prints one table in markdown,
of the loss with label smoothing and its gradients; `--from` renders an earlier run.
"""

import concurrent.futures
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import jax

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.frameworks.jax import JaxFramework
from benchmarks.implementations.settings import Run, Settings, gradient_filter
from benchmarks.inputs import cases, like_models, real
from benchmarks.inputs.arrays import Inputs
from benchmarks.measure import report, runner
from benchmarks.measure.errors import Reference
from benchmarks.measure.report import Report, Row

TOKENS = (2048, 8192, 32768)
SETTINGS = Settings(label_smoothing=0.1)
OURS, NAIVE = (Run(name, "fwdbwd", SETTINGS) for name in ("auto", "naive"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverywhereFlags(flags.TableFlags):
    seconds: Annotated[float, shown("S")] = 1.0
    """About how long to time each row."""
    case: Annotated[tuple[str, ...], shown(f"{{{','.join(cases.CASES)},DxV}} ...")] = tuple(
        name for name in cases.CASES if name != "tiny"
    )
    """Heads to measure at."""
    n: Annotated[tuple[int, ...], shown("TOKENS ...")] = TOKENS
    """Numbers of tokens."""
    gradient_filter: Annotated[str, shown("{auto,none,fused,hidden,fp8,EPSILON}")] = "auto"
    """Our gradients."""
    precision: Annotated[Literal["fp8"] | None, shown("{fp8}", "the operands' own")] = None
    """Permit 8-bit operands for our logits."""
    real: Annotated[tuple[str, ...] | None, shown("CASE=FOLDER ...", "none")] = None
    """Cases and a real model's activations for them, as `benchmarks.extract` writes them."""
    errors: bool = False
    """Compare the gradients with exact ones, too."""

    def check(self) -> None:
        super().check()
        flags.check_at_least(1, "--n", *self.n)
        for name in self.case:
            cases.find(name)
        gradient_filter(self.gradient_filter)
        for text in self.real or ():
            name, equals, folder = text.partition("=")
            if not equals:
                raise ValueError(f"--real {text} must be CASE=FOLDER")
            if name not in self.case:
                raise ValueError(f"--real {text}, but --case is {' '.join(self.case)}")
            if not (path := pathlib.Path(folder) / real.HIDDEN).is_file():
                raise ValueError(f"--real {text}: there is no {path}")

    @property
    def ours(self) -> Run:
        chosen = gradient_filter(self.gradient_filter)
        settings = dataclasses.replace(SETTINGS, gradient_filter=chosen, precision=self.precision)
        return dataclasses.replace(OURS, settings=settings)

    def folder(self, case: str) -> pathlib.Path | None:
        """Where a case's activations are; None where they are drawn."""
        folders = dict(text.split("=", 1) for text in self.real or ())
        return pathlib.Path(folders[case]) if case in folders else None


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("everywhere", parse, make, arguments)


def parse(arguments: Sequence[str] | None = None) -> EverywhereFlags:
    return flags.parse(EverywhereFlags, "everywhere", __doc__, arguments)


def make(options: EverywhereFlags) -> int:
    if options.from_files:
        measured = comparable(sum(map(report.read, options.from_files), Report()), options.ours)
    else:
        measured = Report()
        for name in options.case:
            measured += measure(
                name,
                options.n,
                options.seconds,
                options.commit,
                options.folder(name),
                errors=options.errors,
                ours=options.ours,
            )
            if options.json:  # after each case, so that an interrupted run leaves what it has
                report.write(measured, options.json)
    print(markdown(measured))
    return 0 if measured.rows else 1


def comparable(rows: Report, ours: Run = OURS) -> Report:
    """Rows, and what was skipped, of ours and optax's; ValueError if there are none, none that says
    anything of ours, or they are of several devices."""
    found = Report(
        tuple(row for row in rows.rows if row.run in (ours, NAIVE)),
        tuple(skipped for skipped in rows.skipped if skipped.run in (ours, NAIVE)),
    )
    if not found.rows or all(entry.run == NAIVE for entry in (*found.rows, *found.skipped)):
        raise ValueError(
            f"no row is of {ours}: were they measured by this module, with the same"
            " --gradient-filter and --precision?"
        )
    return report.of_one_device(found)


def measure(
    name: str,
    tokens: Iterable[int],
    seconds: float,
    commit: str | None = None,
    folder: pathlib.Path | None = None,
    *,
    errors: bool = False,
    ours: Run = OURS,
) -> Report:
    """Both runs of a case at each N, smallest first, on the first N of the same tokens."""
    sizes = sorted(tokens)
    drawn = inputs_for(cases.find(name, sizes[-1]), folder)
    measured, parts = Report(), []
    for n in sizes:
        if n > len(drawn.labels):
            reason = f"{name}: {folder} holds {len(drawn.labels)} tokens, not {n}"
            measured += Report(skipped=tuple(report.Skipped(run, reason) for run in (ours, NAIVE)))
        else:
            parts.append(
                dataclasses.replace(drawn, hidden=drawn.hidden[:n], labels=drawn.labels[:n])
            )
    frameworks = [JaxFramework(part) for part in parts]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda framework: framework.ahead([ours]), frameworks))
    for framework, part in zip(frameworks, parts, strict=True):
        print(f"  {part.case(name)} …", file=sys.stderr, flush=True)
        measured += runner.measure_runs(
            framework,
            part,
            name,
            (ours, NAIVE),
            seconds=seconds,
            commit=commit,
            reference=Reference(None, part, compute=errors),
        )
    return measured


def inputs_for(case: cases.Case, folder: pathlib.Path | None) -> Inputs:
    """A folder's activations, as many as there are, or drawn ones; on JAX's device."""
    if folder is None:
        return like_models.draw(case)
    found = real.read(folder, v=case.v)
    if (len(found.head), found.head.shape[1]) != (case.v, case.d):
        raise ValueError(
            f"{folder} holds a head {found.head.shape}, not {(case.v, case.d)} of {case}"
        )
    held: Any = jax.device_put(found)
    return Inputs("real", *held)


def markdown(measured: Report) -> str:
    """A line for each case and N that both ran at; what was skipped follows."""
    if not measured.rows:
        return "Nothing was measured.\n\n" + _skipped(measured.skipped)
    first = measured.rows[0]
    commits = ", ".join(dict.fromkeys(row.commit for row in measured.rows))
    # Of a case that was measured more than once the last counts.
    found = {(row.case, row.n, row.inputs, row.run.implementation): row for row in measured.rows}
    errors = any(row.hidden_error is not None for row in measured.rows)
    lines = [
        f"Loss and gradients, β = {SETTINGS.label_smoothing:g}, {first.dtype}; {first.device}, "
        f"{first.framework}, commit {commits}, {first.time[:10]}. M is the bare product E·Cᵀ; "
        "MB of 2²⁰ bytes beyond the arguments: temporary, and in all with the gradients."
        + " Errors of dE and dC are ‖g − exact‖ / ‖exact‖."
        * errors,
        "",
        "| case | N | D, V | inputs | M ms | optax × M | lsce × M | faster | optax MB | lsce MB |"
        + " optax dE, dC | lsce dE, dC |" * errors,
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
        + " --- | --- |" * errors,
    ]
    for (case, n, kind, name), row in found.items():
        if name == OURS.implementation and (
            other := found.get((case, n, kind, NAIVE.implementation))
        ):
            lines.append(_line(row, other, errors))
    return "\n".join(lines) + "\n\n" + _skipped(measured.skipped)


def _line(ours: Row, naive: Row, errors: bool) -> str:
    def memory(row: Row) -> str:
        return f"{row.temporary_mb or 0:,.0f}, {row.extra_mb or 0:,.0f}"

    def error(row: Row) -> str:
        if row.hidden_error is None or row.head_error is None:
            return "–"
        return f"{row.hidden_error:.4f}, {row.head_error:.4f}"

    cells = [
        ours.case,
        f"{ours.n:,}",
        f"{ours.d:,}, {ours.v:,}",
        ours.inputs,
        f"{min(ours.matmul_ms, naive.matmul_ms):.3g}",
        f"{naive.matmul_ratio:.2f}",
        f"{ours.matmul_ratio:.2f}",
        f"{naive.p50_ms / ours.p50_ms:.2f} ×",
        memory(naive),
        memory(ours),
    ]
    if errors:
        cells += [error(naive), error(ours)]
    return f"| {' | '.join(cells)} |"


def _skipped(skipped: Sequence[report.Skipped]) -> str:
    lines = dict.fromkeys(f"- {s.run.implementation}: {s.reason}" for s in skipped)
    return "\n".join(["Not measured:", "", *lines, ""]) if lines else ""


if __name__ == "__main__":
    sys.exit(main())
