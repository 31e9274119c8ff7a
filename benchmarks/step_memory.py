"""The memory of a training step on several H100s: python -m benchmarks.step_memory.

XLA compiles the trainer's own step, bits repeatable, for H100s that it is told of: it takes jax's
CUDA plugin (`pip install ".[cuda13]"`) and no GPU. Nothing runs and nothing is tuned, and cuBLAS
makes the products. Bytes are those that the compiled program asks of each device, beside what the
CUDA context and NCCL take.
"""

import dataclasses
import datetime
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.measure import report
from benchmarks.measure.described import h100s
from benchmarks.measure.runner import current_commit
from benchmarks.steps.variant import SHAPES, Variant, batch_of, shape_of
from lsce import api
from train import mesh
from train.models import attention
from train.run import loop
from train.run.optimizer import optimizer
from train.run.options import LossOptions, MeshShape, OptimizerOptions, StepOptions
from train.run.step import train_step

PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"
# What would choose between programs has to run them.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemoryFlags(flags.Flags):
    model: Annotated[str, shown(f"{{{','.join(SHAPES)}}}")] = "gemma2-2b"
    """The shape; all of it is trained, weights and moments float32."""
    mesh: Annotated[tuple[str, ...], shown("data=D,fsdp=F ...")] = ("data=2", "fsdp=2")
    """As the trainer's, of two devices or more."""
    rows: Annotated[int, shown("ROWS")] = 8
    """Rows of each device."""
    length: Annotated[int, shown("TOKENS")] = 1024
    """Tokens in a row."""
    remat: Literal["none", "block", "full"] = "block"
    """As the trainer's."""

    def check(self) -> None:
        super().check()
        flags.check_at_least(1, "--rows", self.rows)
        flags.check_at_least(8, "--length", self.length)
        if self.model not in SHAPES:
            raise ValueError(f"--model {self.model}: must be one of {', '.join(SHAPES)}")
        for text in self.mesh:
            flags.check_at_least(2, f"devices of --mesh {text}", MeshShape.read(text).size)
        if not any(map(importlib.util.find_spec, PLUGINS)):
            raise ValueError('needs jax\'s CUDA plugin: pip install ".[cuda13]"')


@dataclasses.dataclass(frozen=True)
class StepMemoryRow:
    """Bytes of each device."""

    model: str
    mesh: str
    rows_per_device: int
    length: int
    remat: str
    state: int
    """Weights and moments: nearly all of the arguments, which the results take the place of."""
    temporary: int
    peak: int
    """Arguments, results and what is alive between, at its most."""
    device: str
    compiled_only: bool
    framework: str
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
        sizes = " | ".join(f"{size / 1e9:.1f}" for size in (row.state, row.temporary, row.peak))
        print(f"| {row.model} | {row.mesh} | {row.rows_per_device} | {row.remat} | {sizes} |")
        if options.json:
            report.write_json([dataclasses.asdict(row) for row in rows], options.json)
    return 0


def _rows(options: StepMemoryFlags) -> Iterator[StepMemoryRow]:
    for text in options.mesh:
        devices = MeshShape.read(text)
        state, program = compiled(options, devices)
        memory = program.memory_analysis()
        yield StepMemoryRow(
            model=options.model,
            mesh=str(devices),
            rows_per_device=options.rows,
            length=options.length,
            remat=options.remat,
            state=mesh.bytes_per_device(state),
            temporary=memory.temp_size_in_bytes,
            peak=memory.peak_memory_in_bytes,
            device=h100s(1)[0].device_kind,
            compiled_only=True,
            framework=f"jax {jax.__version__}",
            commit=options.commit or current_commit(),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


def compiled(options: StepMemoryFlags, devices: MeshShape) -> tuple[Any, Any]:
    """The shapes of the training state with where they lie, and the compiled step."""
    variant = Variant(rows=options.rows * devices.size, remat=options.remat)
    shape = shape_of(options.model, variant)
    chips = h100s(devices.size)
    on = Mesh(np.array(chips).reshape(devices), mesh.ROWS, (AxisType.Auto,) * len(devices))
    create = loop.state_maker(shape, optimizer(OptimizerOptions()), None)
    state = mesh.placed(jax.eval_shape(create, 0), on)
    batch = jax.eval_shape(
        lambda: jax.tree.map(jnp.asarray, batch_of(shape, variant, options.length))
    )
    with (
        mock.patch.object(api, "_device", return_value=chips[0]),
        mock.patch.object(attention, "capability", return_value="9.0"),
    ):
        lowered = train_step.lower(
            state,
            batch,
            jnp.float32(0),
            loss=LossOptions(softcap=shape.final_softcap),
            how=StepOptions(batch_size=variant.rows, mesh=str(devices)),
        )
    return state, lowered.compile(compiler_options={**mesh.REPEATABLE, **UNTUNED})


if __name__ == "__main__":
    sys.exit(main())
