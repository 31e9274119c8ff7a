"""The loop that every kernel here is: tiles of A·B on Hopper's tensor cores, fed by one producer.

A CTA has three warpgroups. The producer streams operand tiles from global to shared memory with
TMA through a ring of `steps` stages; two consumers multiply them with wgmma, each on its own half
of the output tile, and run the epilogue. The ring never drains between output tiles: while one
consumer is in its epilogue the producer already fills stages for the next tile and the other
consumer may still be multiplying, which is what hides the exponentials behind the matmul.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lsce.backends.hopper.tiles import CONSUMERS, staged_columns

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def i32(value) -> Any:
    return jnp.asarray(value, jnp.int32)


def swizzled(row_bytes: int, itemsize: int = 1) -> tuple[Any, Any]:
    """The layout of a shared-memory tile whose rows have so many bytes."""
    swizzle = plgpu.find_swizzle(row_bytes * 8)
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


def smem_tile(shape: tuple[int, ...], dtype, steps: int | None = None):
    """A shared-memory tile in the swizzled layout that TMA writes and wgmma reads."""
    itemsize = jnp.dtype(dtype).itemsize
    transforms = swizzled(shape[-1] * itemsize, itemsize)
    return plgpu.SMEM((*(() if steps is None else (steps,)), *shape), dtype, transforms=transforms)


@dataclasses.dataclass(frozen=True)
class Stream:
    """What one kernel streams and multiplies.

    `tile` is whatever `tiles` passes on: scalars that say which output tile is meant.
    """

    steps: int
    """Stages of the ring."""
    a: tuple[int, int]
    """Shape of an A stage."""
    b: tuple[int, int]
    """Shape of a B stage."""
    accumulator: tuple[int, int]
    """Each consumer's part of the output tile, float32 in registers."""
    length: Callable[[Any], Any]
    """tile → number of ring steps (the inner dimension in stages)."""
    copy: Callable[[Any, Any, Any, Any, Any], None]
    """(tile, step, a_stage, b_stage, barrier): issue the copies, each arriving on the barrier."""
    operands: Callable[[Any, Any, Any], tuple[Any, Any]]
    """(a_stage, b_stage, consumer) → the references that this consumer multiplies."""
    copies: int = 2
    """How many copies fill a stage."""


class Consumer(NamedTuple):
    """A warpgroup that multiplies, and what it may do with the ring.

    Every consumer must either multiply or skip each stage, in order, starting from ring = 0.
    """

    number: Any
    multiply: Callable[[Any, Any], tuple[Any, Any]]
    """(tile, ring) → the tile's product, and ring after its stages."""
    skip: Callable[[Any, Any], Any]
    """(stages, ring) → ring after so many stages that only the other consumer needs."""


def run(
    stream: Stream,
    dtype,
    *,
    tiles: Callable[[Callable[[Any, Any], Any], Any], Any],
    consume: Callable[..., None],
    scratch: dict[str, Any] | None = None,
    cluster: bool = False,
) -> None:
    """Runs the producer and the consumers of one CTA.

    `tiles(visit, carry)` walks this CTA's output tiles in order: carry = visit(tile, carry) for
    each; it must visit the same tiles whoever calls it. `consume(consumer, **scratch)` is the
    consumers' walk over the same stages.
    """
    barrier = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=("member",))
        if cluster
        else plgpu.Barrier
    )
    stage = lambda ring: lax.rem(ring, i32(stream.steps))

    @functools.partial(
        pl.run_scoped,
        a_smem=smem_tile(stream.a, dtype, stream.steps),
        b_smem=smem_tile(stream.b, dtype, stream.steps),
        ready=plgpu.Barrier(num_arrivals=stream.copies, num_barriers=stream.steps),
        consumed=barrier(num_arrivals=CONSUMERS, num_barriers=stream.steps),
        scratch=scratch or {},
        collective_axes="wg",
    )
    def _(a_smem, b_smem, ready, consumed, scratch):
        wg = lax.axis_index("wg")

        @pl.when(wg == CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            def visit(tile, ring):
                def step(k, ring):
                    at = stage(ring)

                    @pl.when(ring >= stream.steps)
                    def _():
                        plgpu.barrier_wait(consumed.at[at])

                    stream.copy(tile, k, a_smem.at[at], b_smem.at[at], ready.at[at])
                    return ring + 1

                return lax.fori_loop(0, stream.length(tile), step, ring)

            total = tiles(visit, i32(0))

            # The last stages are released too: no arrival may be left for a CTA that has gone.
            @pl.loop(jnp.maximum(total - stream.steps, 0), total)
            def _(ring):
                plgpu.barrier_wait(consumed.at[stage(ring)])

        @pl.when(wg < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")

            def multiply(tile, ring):
                length = stream.length(tile)

                def accumulate(acc_ref):
                    def step(k, ring):
                        at = stage(ring)
                        plgpu.barrier_wait(ready.at[at])
                        plgpu.wgmma(acc_ref, *stream.operands(a_smem.at[at], b_smem.at[at], wg))
                        # One product stays in flight, so the stage before this one is free.
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(consumed.at[stage(ring - 1)])

                        return ring + 1

                    lax.fori_loop(0, length, step, ring)
                    return acc_ref[...]

                acc = pl.run_scoped(
                    accumulate, plgpu.WGMMAAccumulatorRef(stream.accumulator, jnp.float32)
                )

                @pl.when(length > 0)
                def _():
                    plgpu.barrier_arrive(consumed.at[stage(ring + length - 1)])

                return acc, ring + length

            def skip(count, ring):
                def step(_, ring):
                    at = stage(ring)
                    plgpu.barrier_wait(ready.at[at])
                    plgpu.barrier_arrive(consumed.at[at])
                    return ring + 1

                return lax.fori_loop(0, count, step, ring)

            consume(Consumer(wg, multiply, skip), **scratch)


def store_stage(rows: int, columns: int, dtype):
    """Staging for `store`, for each consumer its own."""
    return smem_tile((CONSUMERS, rows, staged_columns(rows, columns)), dtype)


def store(value, stage, destination, *, add: bool = False) -> None:
    """Writes some columns of a consumer's tile to global memory through its shared memory, or adds
    them to what is there.

    Goes through TMA, which also cuts off what lies outside the array. The caller waits for the last
    copies (`wait_smem_to_gmem`) before the kernel ends.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage, destination, reduction_op="add" if add else None)


def store_tile(value, stage, destination) -> None:
    """`store` of a whole tile, some columns after the others."""
    for part in epilogue_columns(*value.shape):
        store(value[:, part], stage, destination.at[:, part])


def epilogue_columns(rows: int, columns: int) -> list[slice]:
    """The columns of a consumer's tile, as many at a time as `store` takes."""
    width = staged_columns(rows, columns)
    return [slice(start, start + width) for start in range(0, columns, width)]


def share(count, ctas, cta):
    """How many of `count` items CTA number `cta` takes when it takes every `ctas`-th."""
    return lax.div(count - 1 - cta + ctas, i32(ctas))


def launch(
    body,
    out_type,
    *,
    ctas: int,
    interpret: Any,
    name: str,
    cluster: int = 1,
    threads: int | None = CONSUMERS + 1,
    scratch: dict[str, Any] | None = None,
):
    """The kernel on a grid of `ctas` CTAs (or clusters) of `threads` warpgroups, named "wg".

    A function that launches in loops or branches is under `jax.jit`: each `body` is another to JAX,
    which would trace and lower it, and XLA compile it, again wherever it is called.
    """
    body.__name__ = name
    options = {} if interpret is None else {"interpret": interpret}
    if threads is not None:
        options |= {"num_threads": threads, "thread_name": "wg"}
    if cluster > 1:
        options |= {"cluster": (cluster,), "cluster_names": ("member",)}
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(ctas,),
        grid_names=("cta",),
        scratch_types=scratch or {},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )
