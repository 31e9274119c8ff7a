"""The trainer's own step compiled for H100s that need not be there."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import lsce
from benchmarks.measure.described import h100s
from benchmarks.steps.jax import one_hot_loss
from benchmarks.steps.variant import Variant, batch_of, shape_of
from lsce import api
from train import mesh
from train.models import attention
from train.run.optimizer import optimizer
from train.run.options import LossOptions, MeshShape, OptimizerOptions, StepOptions
from train.run.state import state_maker
from train.run.step import train_step

# What would choose between programs has to run them.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of each device."""

    state: int
    """Weights and moments: nearly all of the arguments, which the results take the place of."""
    temporary: int
    peak: int
    """Arguments, results and what is alive between, at its most."""
    device: str
    framework: str


def measure(model: str, variant: Variant, length: int, devices: MeshShape) -> StepMemory:
    """What the compiled step asks of each device; `variant.rows` are those of all."""
    state, program = compiled(model, variant, length, devices)
    memory = program.memory_analysis()
    return StepMemory(
        state=mesh.bytes_per_device(state),
        temporary=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        device=h100s(1)[0].device_kind,
        framework=f"jax {jax.__version__}",
    )


def compiled(model: str, variant: Variant, length: int, devices: MeshShape) -> tuple[Any, Any]:
    """The shapes of the training state with where they lie, and the compiled step.

    On one device the step is the trainer's where our own kernels attend; else XLA attends, as for
    cuDNN's the library has to be there, and the layers are a loop.
    """
    shape = shape_of(model, variant)
    way, _ = attention.choose(shape, length=length, segments=2, cached=False, capability="9.0")
    ours = way == "flash" and devices.size == 1
    shape = dataclasses.replace(shape, **({"scan": "off"} if ours else {"attention": "xla"}))
    naive = variant.loss == "naive"
    chips = h100s(devices.size)
    on = Mesh(np.array(chips).reshape(devices), mesh.ROWS, (AxisType.Auto,) * len(devices))
    create = state_maker(shape, optimizer(OptimizerOptions()), None)
    state = mesh.placed(jax.eval_shape(create, 0), on)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(shape, variant, length)))
    loss = one_hot_loss if naive else lsce.linear_cross_entropy
    jax.clear_caches()  # a step of these arguments may have been traced with the other loss
    with (
        mock.patch.object(api, "_device", return_value=chips[0]),
        mock.patch.object(attention, "capability", return_value="9.0"),
        mock.patch.object(lsce, "linear_cross_entropy", loss),
    ):
        lowered = train_step.lower(
            state,
            batch,
            jnp.float32(0),
            loss=LossOptions(softcap=shape.final_softcap),
            how=StepOptions(batch_size=variant.rows, mesh=str(devices)),
        )
    return state, lowered.compile(compiler_options={**mesh.REPEATABLE, **UNTUNED})
