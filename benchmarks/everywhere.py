"""Default settings beside naive optax at every case and N: python -m benchmarks.everywhere.

What a user gets who changes nothing must never be slower than what they had, nor need much memory.
Inputs are drawn with the column statistics of real models (`benchmarks.activations`), or are a real
model's where `--real` names a folder of them. Writes JSON and prints one table in markdown, of the
loss with label smoothing and its gradients; `--from` renders an earlier run.
"""

import argparse
import concurrent.futures
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import activations, cases, flags, report, runner
from benchmarks.errors import Reference
from benchmarks.inputs import Inputs
from benchmarks.report import Report, Row
from benchmarks.settings import Run, Settings

TOKENS = (2048, 8192, 32768)
SETTINGS = Settings(label_smoothing=0.1)
OURS, NAIVE = (Run(name, "fwdbwd", SETTINGS) for name in ("auto", "naive"))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.from_files:
            measured = comparable(sum(map(report.read, options.from_files), Report()))
        else:
            measured = Report()
            for name in options.case:
                measured += measure(
                    name,
                    options.n,
                    options.seconds,
                    options.commit,
                    options.real.get(name),
                    errors=options.errors,
                )
                if options.json:  # after each case, so that an interrupted run leaves what it has
                    report.write(measured, options.json)
    except (ValueError, OSError) as error:
        print(f"benchmarks.everywhere: {error}", file=sys.stderr)
        return 2
    print(markdown(measured))
    return 0 if measured.rows else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    about, _, notes = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.everywhere", description=about, epilog=notes
    )
    names = [name for name in cases.CASES if name != "tiny"]
    add = parser.add_argument
    add("--case", nargs="+", default=names, metavar="NAME", help=f"by default {', '.join(names)}")
    add(
        "--n",
        nargs="+",
        type=flags.count,
        default=TOKENS,
        metavar="TOKENS",
        help=f"by default {', '.join(map(str, TOKENS))}",
    )
    add(
        "--real",
        nargs="+",
        type=_real,
        default=(),
        metavar="NAME=FOLDER",
        help="activations that benchmarks.activations can read, and the case they are for",
    )
    add(
        "--seconds",
        type=flags.positive,
        default=1.0,
        help="about how long to time each; default 1",
    )
    add("--errors", action="store_true", help="also compare the gradients with exact ones")
    add("--json", type=flags.new_file, metavar="FILE", help="write the rows there")
    add(
        "--from",
        dest="from_files",
        type=pathlib.Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing; render these rows",
    )
    add("--commit", help="recorded instead of git's answer, where the checkout has no git")
    options = parser.parse_args(arguments)
    options.real = dict(options.real)
    if options.from_files and options.json:
        parser.error("--from measures nothing that --json could keep: leave one of them out")
    for name, folder in options.real.items():
        if name not in options.case:
            parser.error(f"--real {name}={folder}, but --case is {' '.join(options.case)}")
        if not (folder / activations.HIDDEN).is_file():
            parser.error(f"--real {name}={folder}: there is no {folder / activations.HIDDEN}")
    return options


def comparable(rows: Report) -> Report:
    """Of rows and what was skipped, ours and optax's; ValueError if there are no such rows."""
    found = Report(
        tuple(row for row in rows.rows if row.run in (OURS, NAIVE)),
        tuple(skipped for skipped in rows.skipped if skipped.run in (OURS, NAIVE)),
    )
    if not found.rows:
        raise ValueError(f"no row is of {OURS} or {NAIVE}: were they measured by this module?")
    return found


def _real(text: str) -> tuple[str, pathlib.Path]:
    name, equals, folder = text.partition("=")
    if not equals or name not in cases.CASES:
        raise argparse.ArgumentTypeError(f"{text!r} must be CASE=FOLDER")
    return name, pathlib.Path(folder)


def measure(
    name: str,
    tokens: Iterable[int],
    seconds: float,
    commit: str | None = None,
    folder: pathlib.Path | None = None,
    *,
    errors: bool = False,
) -> Report:
    """Both runs of a case at each N, smallest first, on the first N of the same tokens."""
    # Imported here: to render a table nothing of JAX need load.
    from benchmarks.jax_framework import JaxFramework

    sizes = sorted(tokens)
    drawn = inputs_for(cases.find(name, sizes[-1]), folder)
    measured, parts = Report(), []
    for n in sizes:
        if n > len(drawn.labels):
            reason = f"{name}: {folder} holds {len(drawn.labels)} tokens, not {n}"
            measured += Report(skipped=tuple(report.Skipped(run, reason) for run in (OURS, NAIVE)))
        else:
            parts.append(
                dataclasses.replace(drawn, hidden=drawn.hidden[:n], labels=drawn.labels[:n])
            )
    frameworks = [JaxFramework(part) for part in parts]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda framework: framework.ahead([OURS]), frameworks))
    for framework, part in zip(frameworks, parts, strict=True):
        print(f"  {part.case(name)} …", file=sys.stderr, flush=True)
        measured += runner.measure_runs(
            framework,
            part,
            name,
            (OURS, NAIVE),
            seconds=seconds,
            commit=commit,
            reference=Reference(None, part, compute=errors),
        )
    return measured


def inputs_for(case: cases.Case, folder: pathlib.Path | None) -> Inputs:
    """A folder's activations, as many as there are, or drawn ones; on JAX's device."""
    if folder is None:
        return activations.draw(case)
    import jax

    found = activations.read(folder, v=case.v)
    if (len(found.head), found.head.shape[1]) != (case.v, case.d):
        raise ValueError(
            f"{folder} holds a head {found.head.shape}, not {(case.v, case.d)} of {case}"
        )
    arrays: Any = jax.device_put(found)
    return Inputs("real", *arrays)


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
