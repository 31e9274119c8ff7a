"""What devices do to a run: data parallelism, and how to have the same bits each time.

Devices share the rows of a batch, each with the whole model.

XLA splits the model's computations after the rows of the batch, and `lsce` the loss after its
tokens; gradients are summed over the devices. Dropout and the order of the data do not depend on
the number of devices, so only the rounding of the sums does.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ROWS = "rows"
"""The mesh's one axis."""
REPEATABLE = {"xla_gpu_deterministic_ops": True}
"""XLA's options for a program that gives the same bits in every process. Without them a GPU adds
the gradient of an embedding in whatever order comes, and a process picks its matrix products by
timing them."""


def check(count: int) -> None:
    """Raises ValueError if this machine has fewer than `count` devices."""
    if count > jax.local_device_count():
        raise ValueError(
            f"--devices must be at most {jax.local_device_count()}, the devices of this machine"
            f" ({jax.devices()[0].device_kind}), not {count}"
        )


@functools.cache
def mesh(count: int) -> Mesh:
    """The first `count` devices of this machine."""
    return jax.make_mesh(
        (count,), (ROWS,), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:count]
    )


def whole(count: int) -> NamedSharding | None:
    """The sharding of what every device holds as a whole; None for one device, JAX's default."""
    return NamedSharding(mesh(count), PartitionSpec()) if count > 1 else None


def split(batch: Any, count: int, *, axis: int) -> Any:
    """The arrays of a batch, that axis of them split over `count` devices; inside jit or not."""
    if count == 1:
        return batch
    rows = NamedSharding(mesh(count), PartitionSpec(*[None] * axis, ROWS))
    return jax.lax.with_sharding_constraint(batch, rows)
