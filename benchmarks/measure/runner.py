"""Measures runs one after the other in one process; what differs between frameworks is theirs."""

import dataclasses
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks import implementations
from benchmarks.implementations.settings import PRODUCTS, Run, Settings
from benchmarks.inputs.arrays import Inputs
from benchmarks.measure.errors import Gradients, relative_error
from benchmarks.measure.memory import ExtraMemory
from benchmarks.measure.report import Report, Row, Skipped, options
from benchmarks.measure.timing import beside, tflops


class Prepared(NamedTuple):
    """A run ready to be timed: compiled, its arrays on the device."""

    call: Callable[[], Any]
    loss: Callable[[Any], float]
    """Reads the loss from what `call` returned."""
    gradients: Callable[[Any], Gradients]
    """Reads the gradients from what `call` returned in mode fwdbwd."""
    memory: ExtraMemory | None


class Framework(Protocol):
    """JAX or PyTorch, holding one set of inputs on its device."""

    @property
    def name(self) -> implementations.FrameworkName:
        """Whose implementations it runs."""
        ...

    version: str
    device: str

    def wait(self, result: Any) -> None:
        """Blocks until the result of a call is there."""

    def product(self) -> Any:
        """Starts the bare product of the inputs; `wait` waits for it."""
        ...

    def backend(self, run: Run) -> str:
        """Which kernel would run: the implementation itself, or the one that it chooses."""
        ...

    def ahead(self, runs: Iterable[Run]) -> None:
        """Does what can be done for all of these runs at once, while nothing is timed."""

    def prepare(self, run: Run) -> Prepared: ...


def measure_runs(
    framework: Framework,
    inputs: Inputs,
    case: str,
    runs: Iterable[Run],
    *,
    seconds: float = 2.0,
    commit: str | None = None,
    reference: Callable[[Settings], Gradients | None] = lambda settings: None,
    announce: Callable[[str], None] = lambda line: None,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """One row a run, or the reason why there is none; a run that fails does not stop the others.

    `seconds` is about how long each is timed; `commit` stands in for git's where there is no git;
    `reference` gives the exact gradients to compare with, or None; `announce` is told what is about
    to run, and `save` gets the report so far after each. ValueError for an unknown implementation,
    before anything runs.
    """
    runs = list(runs)
    known = implementations.of_framework(framework.name)
    for run in runs:
        if run.implementation not in known:
            raise ValueError(
                f"no implementation {run.implementation!r}; must be one of {', '.join(known)}"
            )
    commit = commit or current_commit()
    shape = inputs.case(case)
    wanted, skipped = _select(framework, runs)
    report = Report(skipped=skipped)
    framework.ahead(wanted)
    for run, backend in wanted.items():
        packages = known[run.implementation].packages
        announce(f"{run.implementation} {run.mode} {options(run)}")
        try:
            prepared = framework.prepare(run)
            both = prepared.call, framework.product
            timing, bare = beside(both, framework.wait, seconds=seconds)
            result = prepared.call()
            loss = prepared.loss(result)
        except Exception as error:
            # A peer may fail in any way there is: absent, out of memory, a kernel that won't build.
            report += Report(skipped=(Skipped(run, failure(error, packages)),))
            continue
        errors = {}
        try:
            if run.mode == "fwdbwd" and (exact := reference(run.settings)):
                pairs = zip(prepared.gradients(result), exact, strict=True)
                hidden_error, head_error = (relative_error(*pair) for pair in pairs)
                errors = {"hidden_error": hidden_error, "head_error": head_error}
        except Exception as error:  # out of memory: what was timed is good without them
            announce(f"no errors of {run.implementation}: {type(error).__name__}: {error}")
        memory = prepared.memory
        speed = tflops(shape.n, shape.d, shape.v, timing.p50_ms, PRODUCTS[run.mode])
        row = Row(
            run=run,
            backend=backend,
            case=case,
            n=shape.n,
            d=shape.d,
            v=shape.v,
            dtype=inputs.hidden.dtype.name,
            inputs=inputs.kind,
            loss=loss,
            p20_ms=timing.p20_ms,
            p50_ms=timing.p50_ms,
            p80_ms=timing.p80_ms,
            samples=timing.samples,
            launches=timing.launches,
            temporary_mb=memory and memory.temporary_mb,
            output_mb=memory and memory.output_mb,
            extra_mb=memory and memory.mb,
            tflops=speed,
            matmul_ms=bare.p50_ms,
            matmul_ratio=timing.p50_ms / bare.p50_ms,
            matmul_share=speed / tflops(shape.n, shape.d, shape.v, bare.p50_ms),
            device=framework.device,
            framework=_versions(framework.version, packages),
            python=platform.python_version(),
            commit=commit,
            **errors,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        report += Report(rows=(row,))
        save(report)
    return report


def _select(
    framework: Framework, runs: Iterable[Run]
) -> tuple[dict[Run, str], tuple[Skipped, ...]]:
    """The runs worth measuring with their backends, and the others with the reason."""
    wanted: dict[Run, str] = {}
    skipped: list[Skipped] = []
    seen: set[Run] = set()
    for run in runs:
        implementation = implementations.IMPLEMENTATIONS[run.implementation]
        if reason := implementation.refuses(run.settings):
            skipped.append(Skipped(run, reason))
            continue
        try:
            backend = framework.backend(run)
        except Exception as error:
            skipped.append(Skipped(run, failure(error)))
            continue
        heeded = dataclasses.replace(run, settings=implementation.heeded(run.settings, backend))
        if heeded in seen:
            reason = f"{backend} runs the same whatever these options are"
            skipped.append(Skipped(run, reason))
            continue
        seen.add(heeded)
        wanted[run] = backend
    return wanted, tuple(skipped)


def current_commit() -> str:
    """The checkout's commit, `-dirty` where files have changed since; "unknown" without git."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
    ]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def failure(error: Exception, packages: Iterable[str] = ()) -> str:
    """An error in one line; of an absent library also what to install."""
    text = str(error).strip().splitlines() or [""]
    line = f"{type(error).__name__}: {text[0]}"
    if isinstance(error, ImportError) and packages:
        line += f"; pip install {' '.join(packages)}"
    return line


def _versions(framework: str, packages: Iterable[str]) -> str:
    return ", ".join((framework, *map(_version, packages)))


def _version(package: str) -> str:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout, say
        version = "of unknown version"
    return f"{package} {version}"
