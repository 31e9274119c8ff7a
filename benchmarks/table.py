"""Our rows beside every installed peer's: python -m benchmarks.table --case gemma2-2b --json FILE.

Runs each framework in a process of its own on the same inputs, writes all rows as JSON, and prints
two tables in markdown, with label smoothing and without, laid out as in the papers on this loss:
memory and time of the loss and of loss and gradient, and the gradient's time. What is not installed
is left out and says what to install. `--from FILE` renders an earlier run.
"""

import dataclasses
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, NamedTuple

from benchmarks import flags, inputs
from benchmarks.flags import shown
from benchmarks.frameworks import worker
from benchmarks.implementations import IMPLEMENTATIONS, FrameworkName
from benchmarks.implementations.settings import MODES, Mode, Run, Settings
from benchmarks.inputs import arrays, cases
from benchmarks.measure import report, runner
from benchmarks.measure.report import Report, Row

LABEL_SMOOTHING = 0.1


class Line(NamedTuple):
    """A line of the tables: an implementation with its options, apart from β."""

    title: str
    implementation: str
    settings: Settings = Settings()

    @property
    def framework(self) -> FrameworkName:
        return IMPLEMENTATIONS[self.implementation].framework

    def run(self, mode: Mode, label_smoothing: float) -> Run:
        settings = dataclasses.replace(self.settings, label_smoothing=label_smoothing)
        return Run(self.implementation, mode, settings)


EXACT = Settings(gradient_filter=None)
LINES = (
    Line("**lsce**", "auto"),
    Line("lsce, vocabulary in mean-logit order", "auto", Settings(vocab_order=True)),
    Line("lsce, no filter (exact)", "auto", EXACT),
    Line("lsce, dE filtered, dC not", "auto", Settings(gradient_filter="hidden")),
    Line("lsce, fused gradients", "auto", Settings(gradient_filter="fused")),
    Line("lsce, the filter's rest in 8 bits", "auto", Settings(gradient_filter="fp8")),
    Line("lsce, logits in 8 bits too", "auto", Settings(precision="fp8")),
    Line("optax, one-hot labels", "naive"),
    Line("optax, integer labels", "naive-integer"),
    Line("jax-cce", "jax-cce"),
    Line("tokamax, chunked XLA", "tokamax"),
    Line("torch, eager", "torch-eager"),
    Line("torch.compile", "torch-compile"),
    Line("cut-cross-entropy", "cut-cross-entropy"),
    Line("cut-cross-entropy, no filter", "cut-cross-entropy", EXACT),
    Line("Liger, its Triton kernels", "liger"),
    Line("Liger, its Triton kernels, in larger chunks", "liger-chunks"),
    Line("Liger, CuTe DSL on each chunk", "liger-cute"),
    Line("Liger for Hopper, FLCE", "liger-flce"),
    Line("Liger for Hopper, FLSCE", "liger-flsce"),
    Line("QuACK", "quack"),
    Line("flash-linear-attention", "fla"),
    Line("flash-linear-attention, dC in the head's dtype", "fla-bfloat16"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOfPeersFlags(flags.TableFlags):
    case: Annotated[str, shown(f"{{{','.join(cases.CASES)},DxV}}")] = "gemma2-2b"
    """Shapes to measure at."""
    n: Annotated[int | None, shown("TOKENS", "the case's own")] = None
    """Number of tokens, instead of the case's own."""
    inputs: Annotated[str, flags.shown_inputs()] = "peaked"
    dtype: Annotated[str, shown("{bfloat16,float32}")] = "bfloat16"
    """The dtype of hidden states and head."""
    seed: Annotated[int, shown("SEED")] = 0
    """Decides the random inputs."""
    frameworks: tuple[FrameworkName, ...] = worker.FRAMEWORKS
    """Only these."""
    lines: Annotated[tuple[str, ...], shown("WORDS ...", "all")] = ("",)
    """Only lines whose title contains one of these."""

    def check(self) -> None:
        super().check()
        flags.check_at_least(1, "--n", self.n)
        flags.check_at_least(0, "--seed", self.seed)
        for part in self.lines:
            if not any(part in line.title for line in LINES):
                titles = ", ".join(line.title for line in LINES)
                raise ValueError(f"--lines: no title contains {part!r}; the titles are {titles}")
        if not any(any(runs_of(framework, self.lines)) for framework in self.frameworks):
            only, lines = " ".join(self.frameworks), " ".join(self.lines)
            raise ValueError(f"--frameworks {only} runs none of --lines {lines}")


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("table", parse, make, arguments)


def parse(arguments: Sequence[str] | None = None) -> TableOfPeersFlags:
    return flags.parse(TableOfPeersFlags, "table", __doc__, arguments)


def make(options: TableOfPeersFlags) -> int:
    if options.from_files:
        measured = one_case(sum(map(report.read, options.from_files), Report()))
    else:
        case = cases.find(options.case, options.n)
        data = inputs.named(options.inputs, case, options.dtype, seed=options.seed)
        measured = measure(
            data,
            case.name,
            options.seconds,
            options.commit,
            options.frameworks,
            options.lines,
            options.json,
        )
    print(markdown(measured))
    return 0 if measured.rows else 1


def one_case(rows: Report) -> Report:
    """The rows again; ValueError if they are not of one case on one device, of which alone a table
    can be."""
    of = {f"{row.case} at N = {row.n:,}, {row.dtype}, {row.inputs} inputs" for row in rows.rows}
    if len(of) > 1:
        raise ValueError(
            f"rows of one case are wanted, not of {'; '.join(sorted(of))}."
            " Several cases are for python -m benchmarks.everywhere --from"
        )
    return report.of_one_device(rows)


def measure(
    data: arrays.Inputs,
    case: str,
    seconds: float,
    commit: str | None = None,
    frameworks: Sequence[FrameworkName] = worker.FRAMEWORKS,
    titles: Sequence[str] = ("",),
    json: pathlib.Path | None = None,
) -> Report:
    """Measures every line, one process a framework; a process that dies skips its other lines.

    Writes the rows to `json` as they come: a machine may be gone before the last of them.
    """
    commit = commit or runner.current_commit()
    total = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        arrays.save(data, folder / "inputs.npz")
        for framework in frameworks:
            runs = tuple(runs_of(framework, titles))
            last = framework == frameworks[-1]
            worker.write_plan(worker.Plan(case, runs, seconds, commit, last), framework, folder)
            command = [sys.executable, "-m", "benchmarks.frameworks.worker", framework, name]
            total = _with_rows_of(command, worker.report_path(framework, folder), runs, total, json)
    return total


def _with_rows_of(
    command: Sequence[str],
    path: pathlib.Path,
    runs: Iterable[Run],
    before: Report,
    json: pathlib.Path | None,
) -> Report:
    """The rows so far and those that a process writes to `path`, in `json` as they come."""
    runs = tuple(runs)

    def save(reason: str) -> Report:
        found = before + finished(path, runs, reason)
        if json:
            report.write(found, json)
        return found

    try:
        code = watched(command, lambda: save("interrupted"))
    except BaseException:
        save("interrupted")
        raise
    return save(f"the {command[3]} process ended with code {code}")


def watched(command: Sequence[str], meanwhile: Callable[[], object], seconds: float = 2.0) -> int:
    """A process's exit status, with something done every some seconds until it ends."""
    with subprocess.Popen(command) as process:
        try:
            while True:
                try:
                    return process.wait(seconds)
                except subprocess.TimeoutExpired:
                    meanwhile()
        except BaseException:
            process.kill()
            raise


def finished(path: pathlib.Path, runs: Iterable[Run], reason: str) -> Report:
    """What a process has written, the rest of its runs skipped for the reason it ended."""
    written = report.read(path) if path.exists() else Report()
    known = {row.run for row in written.rows} | {skipped.run for skipped in written.skipped}
    left = tuple(report.Skipped(run, reason) for run in runs if run not in known)
    return written + Report(skipped=left)


def runs_of(framework: str, titles: Sequence[str] = ("",)) -> Iterator[Run]:
    """The runs of one framework's lines whose title has one of these parts, by β."""
    for label_smoothing in (LABEL_SMOOTHING, 0.0):
        for line in LINES:
            if line.framework == framework and any(part in line.title for part in titles):
                for mode in MODES:
                    yield line.run(mode, label_smoothing)


def markdown(measured: Report) -> str:
    """Both tables, a heading that says where the figures come from, and what was skipped."""
    if not measured.rows:
        return "Nothing was measured.\n\n" + _skipped(measured)
    first = measured.rows[0]
    versions = sorted({part for row in measured.rows for part in row.framework.split(", ")})
    commits = ", ".join(dict.fromkeys(row.commit for row in measured.rows))
    heading = (
        f"{first.case}: N, D, V = {first.n:,}, {first.d:,}, {first.v:,}, {first.dtype}, "
        f"{first.inputs} inputs; {first.device}; {', '.join(versions)}; "
        f"commit {commits}, {first.time[:10]}.\n"
        f"Bare product E·Cᵀ: {report.matmul_ms(measured):.4g} ms. Times are medians in ms, the "
        "gradient's is the difference of the two beside it; memory is what the call needs beyond "
        "its arguments, the gradients themselves included, in MB of 2²⁰ bytes. Errors are "
        "‖g − exact‖ / ‖exact‖."
    )
    return "\n\n".join(
        [heading, *(_table(measured, beta) for beta in (LABEL_SMOOTHING, 0.0)), _skipped(measured)]
    )


def _table(measured: Report, label_smoothing: float) -> str:
    rows = {row.run: row for row in measured.rows}
    lines = [
        f"**β = {label_smoothing:g}**",
        "",
        "| | loss MB | loss ms | gradient ms | loss + gradient MB | ms | × E·Cᵀ | dE, dC error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in LINES:
        forward, both = (rows.get(line.run(mode, label_smoothing)) for mode in MODES)
        if forward or both:
            lines.append(_line(line.title, forward, both))
    return "\n".join(lines)


def _line(title: str, forward: Row | None, both: Row | None) -> str:
    def cell(row: Row | None, field: str, form: str) -> str:
        value = row and getattr(row, field)
        return "–" if value is None else format(value, form)

    gradient = "–"
    if forward and both:
        gradient = f"{both.p50_ms - forward.p50_ms:.3g}"
    errors = [cell(both, field, ".2g") for field in ("hidden_error", "head_error")]
    cells = [
        title,
        cell(forward, "extra_mb", ",.1f"),
        cell(forward, "p50_ms", ".3g"),
        gradient,
        cell(both, "extra_mb", ",.1f"),
        cell(both, "p50_ms", ".3g"),
        cell(both, "matmul_ratio", ".2f"),
        ", ".join(errors),
    ]
    return f"| {' | '.join(cells)} |"


def _skipped(measured: Report) -> str:
    """One line a reason, with the titles it holds for."""
    titles: dict[str, dict[str, None]] = {}
    for skipped in measured.skipped:
        run = skipped.run
        for line in LINES:
            if run == line.run(run.mode, run.settings.label_smoothing):
                titles.setdefault(skipped.reason, {})[line.title] = None
    lines = (f"- {reason}: {'; '.join(names)}" for reason, names in titles.items())
    return "\n".join(["Not measured:", "", *lines]) if titles else ""


if __name__ == "__main__":
    # A time limit ends a process with SIGTERM: what is measured by then is not to be lost.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
