"""`--memory`: how to compute a step in what a device has, by what XLA compiles for each way."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import numpy as np

from train import mesh
from train.config import TrainConfig
from train.data.packing import Rows
from train.run.options import StepOptions
from train.run.state import StateMaker
from train.run.step import step_of

logger = logging.getLogger(__name__)

GB = 10**9
LESS = "--weights bfloat16, --freeze, --lora-rank or more devices (--mesh fsdp=)"
Remat = Literal["none", "block", "full"]


def fitting(config: TrainConfig, maker: Callable[[Remat], StateMaker], rows: Rows) -> TrainConfig:
    """The configuration with a way to compute a step that fits into `--memory`.

    What is compiled for that is kept as XLA's other programs are, so that the first step need not
    compile it again.

    Args:
      maker: makes the state of a run with that `--remat`.
      rows: some of those of the data.

    Raises ValueError if nothing fits.
    """
    given, seed = config.step.memory, config.run.seed
    assert given is not None
    batch = rows[np.arange(config.step.rows) % len(rows)]
    state = jax.eval_shape(maker(config.model.remat), seed)
    held = mesh.bytes_per_device(mesh.placed(state, mesh.make(config.step.mesh_shape))) / GB
    if held > given:
        raise ValueError(
            f"--memory {given:g}: weights and moments alone take {held:.3g} GB of each device;"
            f" {LESS} take less"
        )

    def size(remat: Remat, step: StepOptions) -> int:
        state = mesh.placed(jax.eval_shape(maker(remat), seed), mesh.make(step.mesh_shape))
        lowered = step_of(step).lower(state, batch, 0.0, config.loss, step)
        return compiled_bytes(lowered.compile())

    remat, step = choose(config.step, size)
    return config.replace(remat=remat, batch_size=step.batch_size, accumulate=step.accumulate)


def ways(step: StepOptions) -> Iterator[tuple[Remat, StepOptions]]:
    """The ways to compute the same step, by how much they recompute and divide it.

    More is recomputed first, then fewer rows are in memory at a time, as long as every device has
    some. The rows of a step stay the same.
    """
    devices = step.mesh_shape.size
    for parts in range(1, step.batch_size + 1):
        rows, odd = divmod(step.batch_size, parts)
        if not odd and rows % devices == 0:
            divided = dataclasses.replace(step, batch_size=rows, accumulate=step.accumulate * parts)
            for remat in get_args(Remat):
                yield remat, divided


def choose(
    step: StepOptions, size: Callable[[Remat, StepOptions], int]
) -> tuple[Remat, StepOptions]:
    """The first of `ways` whose size is at most `step.memory` · 10⁹ bytes.

    Raises:
      ValueError: if there is none, naming the least that was found.
    """
    assert step.memory is not None
    sizes = []
    for remat, divided in ways(step):
        found = size(remat, divided)
        how = f"--remat {remat} --batch-size {divided.batch_size} --accumulate {divided.accumulate}"
        sizes.append((found, how))
        fits = found <= step.memory * GB
        logger.info("memory: %.3g GB with %s%s", found / GB, how, ", which fits" if fits else "")
        if fits:
            return remat, divided
    least, how = min(sizes)
    raise ValueError(
        f"--memory {step.memory:g}: a step takes {least / GB:.3g} GB at least, with {how};"
        f" {LESS}, or shorter rows (--max-length), take less"
    )


def compiled_bytes(compiled: Any) -> int:
    """What a compiled program holds on each device while it runs: arguments, results that do not
    take their place, and what it needs between."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
