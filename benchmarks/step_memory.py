"""The memory of a training step on H100s: python -m benchmarks.step_memory.

XLA compiles the trainer's own step, bits repeatable, for H100s that it is told of: it takes jax's
CUDA plugin (`pip install ".[cuda13]"`) and no GPU. Nothing runs and nothing is tuned; cuBLAS
makes the products, and on several devices XLA's own attention attends. Bytes are those
that the compiled program asks of each device, beside what the CUDA context and NCCL take.
"""

import dataclasses
import datetime
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.measure import report
from benchmarks.measure.runner import current_commit
from benchmarks.steps import memory
from benchmarks.steps.memory import MeshShape, StepMemory
from benchmarks.steps.variant import SHAPES, Variant

PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemoryFlags(flags.Flags):
    model: Annotated[str, shown(f"{{{','.join(SHAPES)}}}")] = "gemma2-2b"
    """The shape; all of it is trained, weights and moments float32."""
    mesh: Annotated[tuple[str, ...], shown("data=D,fsdp=F ...")] = ("data=2", "fsdp=2")
    """As the trainer's."""
    rows: Annotated[tuple[int, ...], shown("ROWS ...")] = (8,)
    """Rows of each device."""
    loss: Literal["auto", "naive"] = "auto"
    """naive is optax's, on all logits."""
    length: Annotated[int, shown("TOKENS")] = 1024
    """Tokens in a row."""
    remat: Literal["none", "block", "full"] = "block"
    """As the trainer's."""

    def check(self) -> None:
        super().check()
        for rows in self.rows:
            flags.check_at_least(1, "--rows", rows)
        flags.check_at_least(8, "--length", self.length)
        if self.model not in SHAPES:
            raise ValueError(f"--model {self.model}: must be one of {', '.join(SHAPES)}")
        for text in self.mesh:
            MeshShape.read(text)
        if not any(map(importlib.util.find_spec, PLUGINS)):
            raise ValueError('needs jax\'s CUDA plugin: pip install ".[cuda13]"')


@dataclasses.dataclass(frozen=True)
class StepMemoryRow:
    model: str
    mesh: str
    rows: int
    """Rows of each device."""
    length: int
    remat: str
    loss: str
    found: StepMemory
    compiled_only: bool
    commit: str
    time: str
    """UTC, ISO 8601."""


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("step_memory", parse, make, arguments)


def parse(arguments: Sequence[str] | None = None) -> StepMemoryFlags:
    return flags.parse(StepMemoryFlags, "step_memory", __doc__, arguments)


def make(options: StepMemoryFlags) -> int:
    rows: list[StepMemoryRow] = []
    print("| model | mesh | rows a device | remat | state, GB | temporary | peak |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: |")
    for row in _rows(options):
        rows.append(row)
        sizes = (row.found.state, row.found.temporary, row.found.peak)
        cells = (row.model, row.mesh, row.rows, row.remat, *(f"{size / 1e9:.1f}" for size in sizes))
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        if options.json:
            report.write_json([dataclasses.asdict(row) for row in rows], options.json)
    return 0


def _rows(options: StepMemoryFlags) -> Iterator[StepMemoryRow]:
    for text, rows in itertools.product(options.mesh, options.rows):
        devices = MeshShape.read(text)
        variant = Variant(rows=rows * devices.size, remat=options.remat, loss=options.loss)
        yield StepMemoryRow(
            model=options.model,
            mesh=str(devices),
            rows=rows,
            length=options.length,
            remat=options.remat,
            loss=options.loss,
            found=memory.measure(options.model, variant, options.length, devices),
            compiled_only=True,
            commit=options.commit or current_commit(),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


if __name__ == "__main__":
    sys.exit(main())
