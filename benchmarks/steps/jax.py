"""The trainer's own step and decoder, compiled ahead and timed."""

import collections
import concurrent.futures
import glob
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

import lsce
from benchmarks.implementations.optax import one_hot
from benchmarks.implementations.settings import Settings
from benchmarks.measure import timing
from benchmarks.steps.real import Real
from benchmarks.steps.row import Measured, why
from benchmarks.steps.variant import Variant, batch_of, shape_of
from train import mesh
from train.models import attention
from train.models.config import ModelConfig
from train.run.optimizer import optimizer
from train.run.options import LossOptions, OptimizerOptions, StepOptions
from train.run.prepare import written_out
from train.run.state import state_maker
from train.run.step import train_step_autotuned

OPTIONS = {
    "repeatable": mesh.REPEATABLE,
    "excluded": {"xla_gpu_exclude_nondeterministic_ops": True},
    "tuned": {},
}
RATE = 1e-4
OPTIMIZER = optimizer(OptimizerOptions())


def measure(
    model: str,
    variants: Sequence[Variant],
    length: int,
    *,
    seconds: float,
    profile: bool,
    real: Real | None = None,
) -> Iterator[tuple[Variant, Measured | str]]:
    """Each variant and what was found, or why nothing was. All compile at once, before any runs."""
    lowered = [_try(lambda v=v: _lower(model, v, length, real)) for v in variants]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        programs = list(pool.map(_compile, variants, lowered))
    for variant in variants:
        program = programs.pop(0)  # its memory goes with it
        if isinstance(program, str):
            yield variant, program
        else:
            yield (
                variant,
                _try(
                    lambda p=program, v=variant: _run(model, v, length, p, seconds, profile, real)
                ),
            )


def _try[R](work: Callable[[], R]) -> R | str:
    try:
        return work()
    except Exception as error:  # out of memory, a kernel that does not build: the next may do
        return why(error)


def _shape(model: str, variant: Variant, real: Real | None) -> ModelConfig:
    shape = shape_of(model, variant)
    if real is not None:
        shape = real.shape(shape)
    if variant.scan == "auto":
        shape = written_out(shape, repeatable=variant.bits == "repeatable")
    return shape


def _batch(
    shape: ModelConfig, variant: Variant, length: int, real: Real | None
) -> dict[str, Int[np.ndarray, "B _"]]:
    return batch_of(shape, variant, length) if real is None else real.batch(variant, length)


def _lower(model: str, variant: Variant, length: int, real: Real | None) -> Any:
    shape = _shape(model, variant, real)
    naive = variant.loss == "naive"
    loss = LossOptions(
        label_smoothing=variant.beta,
        softcap=shape.final_softcap,
        implementation="auto" if naive else variant.loss,
        gradient_filter=variant.filter,
    )
    devices = variant.devices
    mesh.check(devices)
    how = StepOptions(batch_size=variant.rows, accumulate=variant.accumulate, mesh=str(devices))
    on = mesh.make(devices)
    state = jax.eval_shape(state_maker(shape, OPTIMIZER, on), 0)
    state = state if on is None else mesh.placed(state, on)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _batch(shape, variant, length, real)))
    batch, rate = _everywhere((batch, jax.ShapeDtypeStruct((), jnp.float32)), on)
    jax.clear_caches()  # a step of these arguments may have been traced with the other loss
    with mock.patch.object(
        lsce, "linear_cross_entropy", one_hot_loss if naive else lsce.linear_cross_entropy
    ):
        return train_step_autotuned.lower(state, batch, rate, loss=loss, how=how)


def _everywhere(arrays: Any, on: Mesh | None) -> Any:
    """The shapes of arrays that each device of a mesh has whole, as the trainer hands a batch."""
    if on is None:
        return arrays
    whole = NamedSharding(on, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arrays)


def one_hot_loss(hidden: Any, head: Any, labels: Any, *, ignore_index: int, **options: Any) -> Any:
    """optax on whole logits; of the statistics, nothing."""
    settings = Settings(label_smoothing=options["label_smoothing"], softcap=options["softcap"])
    flat = labels.reshape(-1)
    # optax's mean over all tokens times their number: labels that are ignored are few here, and
    # one_hot gives them no class.
    total = one_hot(hidden.reshape(flat.size, -1), head, flat, None, settings) * flat.size
    nothing = jnp.zeros(labels.shape)
    return total, SimpleNamespace(confidence=nothing, correct=nothing > 0)


def _compile(variant: Variant, lowered: Any) -> tuple[Any, float] | str:
    if isinstance(lowered, str):
        return lowered
    flags = dict(pair.split("=", 1) for pair in filter(None, variant.flags.split(";")))
    options = OPTIONS[variant.bits] if jax.default_backend() == "gpu" else {}
    start = time.perf_counter()
    compiled = _try(lambda: lowered.compile(compiler_options={**options, **flags} or None))
    if isinstance(compiled, str):
        return compiled
    return compiled, time.perf_counter() - start


def _run(
    model: str,
    variant: Variant,
    length: int,
    program: tuple[Any, float],
    seconds: float,
    profile: bool,
    real: Real | None,
) -> Measured:
    compiled, compile_s = program
    shape = _shape(model, variant, real)
    plan = compiled.memory_analysis()
    peak = (
        plan.argument_size_in_bytes
        + plan.temp_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
    )
    on = mesh.make(variant.devices)
    batch, rate = _batch(shape, variant, length, real), jnp.float32(RATE)
    given = _everywhere(jax.eval_shape(lambda: (batch, rate)), on)
    batch, rate = jax.device_put((batch, rate), jax.tree.map(lambda x: x.sharding, given))
    create = state_maker(shape, OPTIMIZER, on)
    state = create(0) if real is None else real.state(create, on)

    def step() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, batch, rate)
        return metrics.loss

    first = float(step())
    times = timing.beside([step], seconds=seconds)[0]
    if profile:
        _profile(step, f"{model} {variant}")
    size = mesh.bytes_per_device((state.params, state.opt_state))
    starts = batch.get("starts")
    way, reason = attention.choose(
        shape,
        length=length,
        segments=None if starts is None else starts.shape[1],
        cached=False,
        capability=attention.capability(),
    )
    return Measured(
        p20_ms=times.p20_ms,
        p50_ms=times.p50_ms,
        p80_ms=times.p80_ms,
        first_loss=first,
        last_loss=float(step()),
        state_gb=size / 1e9,
        peak_gb=peak / 1e9,
        compile_s=compile_s,
        attention=f"{way}: {reason}",
        device=jax.devices()[0].device_kind,
        framework=f"jax {jax.__version__}",
    )


def _profile(step: Callable[[], jax.Array], title: str, steps: int = 3, lines: int = 45) -> None:
    """Prints the kernels of a step by their time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([step() for _ in range(steps)])
        (path,) = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    total, count = collections.Counter[str](), collections.Counter[str]()
    for plane in data.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                total[event.name] += event.duration_ns / 1e6 / steps
                count[event.name] += 1
    print(f"--- {title}: {sum(total.values()):.2f} ms of kernels, {count.total() // steps} of them")
    for name, ms in total.most_common(lines):
        print(f"{ms:9.3f} ms {count[name] / steps:7.1f} x {name[:120]}")
