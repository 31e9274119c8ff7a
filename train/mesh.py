"""What devices do to a run: where its arrays lie, and how to have the same bits each time.

The devices are a mesh of two axes, and the rows of a batch are split over both. `data` repeats what
is trained. `fsdp` splits it: each device holds its share of every matrix, of its gradient and of
its moments, and has the whole of a matrix only while it multiplies by it, in the activations'
dtype. An axis for tensors would be a word of `AXES` more that has one in `RULES`.

XLA splits the computations after the arrays, and `lsce` the loss after its tokens. Dropout and the
order of the data do not depend on the mesh, so only the rounding of sums does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from train import hosts
from train.run.options import MeshShape

AXES: Mapping[str, tuple[str, str]] = {
    "embedding.embedding": ("vocab", "hidden"),
    "untied_head": ("vocab", "hidden"),
    "attention.query.kernel": ("hidden", "heads"),
    "attention.key.kernel": ("hidden", "kv_heads"),
    "attention.value.kernel": ("hidden", "kv_heads"),
    "attention.out.kernel": ("heads", "hidden"),
    "mlp.gate.kernel": ("hidden", "mlp"),
    "mlp.up.kernel": ("hidden", "mlp"),
    "mlp.down.kernel": ("mlp", "hidden"),
}
"""The last two axes of a weight by the end of its path; an axis of layers may stand before them.
What is not here is small, a norm's scale, a bias or an adapter, and whole on every device."""
RULES: Mapping[str, str] = {"hidden": "fsdp"}
"""The axis of the mesh that splits an axis of a weight: every matrix has `hidden` once. Where fsdp
does not divide it, it splits the weight's other axis; where it divides neither, none."""
ROWS = MeshShape._fields
"""The axes of the mesh that split the rows of a batch."""
REPEATABLE = {"xla_gpu_deterministic_ops": True}
"""XLA's options for a program that gives the same bits in every process. Without them a GPU adds
the gradient of an embedding in whatever order comes, and a process picks its matrix products by
timing them."""


def check(shape: MeshShape) -> None:
    """Raises ValueError if there are fewer devices than the mesh has, or, of several processes,
    others: each must have a part."""
    there, several = jax.device_count(), hosts.count() > 1
    if shape.size > there or (several and shape.size != there):
        whose = f"the {hosts.count()} processes have" if several else "this machine"
        raise ValueError(
            f"--mesh {shape} has {shape.size} devices, and {whose} {there}"
            f" ({jax.devices()[0].device_kind})"
        )


@functools.cache
def make(shape: MeshShape) -> Mesh | None:
    """The first devices as a mesh; None for one device, which is left to JAX."""
    if shape.size == 1:
        return None
    return jax.make_mesh(
        shape, ROWS, (AxisType.Auto,) * len(ROWS), devices=jax.devices()[: shape.size]
    )


def spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a weight is split, or what follows it as its gradient and its moments do.

    Args:
        path: its names, with dots between.
        shape: its own.
        sizes: of the mesh's axes.
    """
    for end, names in AXES.items():
        if f".{end}." in f".{path}." and len(shape) >= len(names):
            which = next(i for i, name in enumerate(names) if name in RULES)
            axis = RULES[names[which]]
            for i in (which - 2, -1 - which):
                if shape[i] % sizes[axis] == 0:
                    return PartitionSpec(*[None] * (len(shape) + i), axis)
    return PartitionSpec()


def sharding(path: str, shape: tuple[int, ...], mesh: Any) -> NamedSharding | None:
    """Where a weight lies on a mesh; None without one, which is JAX's default."""
    return None if mesh is None else NamedSharding(mesh, spec(path, shape, mesh.shape))


def shardings(tree: Any, mesh: Any) -> Any:
    """`sharding` of each array of a tree, by its path. Without a mesh, this machine's first device.

    Which is said, and not left to JAX: it would compile one program for arrays of a new run, and
    another for those of a checkpoint.
    """
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: here, tree)

    def place(path: Any, leaf: Any) -> NamedSharding | None:
        return sharding(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(tree: Any, on: Mesh | None) -> Any:
    """The shapes of a tree's arrays with where they lie, as a checkpoint is restored to."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(tree, on),
    )


def laid(tree: Any, on: AbstractMesh | None) -> Any:
    """The tree with each array, and its gradient, where `shardings` has it; in jit."""
    return tree if on is None else jax.lax.with_sharding_constraint(tree, shardings(tree, on))


def cast(tree: Any, on: AbstractMesh | None, dtype: str) -> Any:
    """The tree with its matrices in another dtype, each still where `shardings` has it; in jit.

    For `whole` to gather them in that dtype: left to itself XLA would gather first.
    """
    if on is None:
        return tree
    return laid(
        jax.tree.map(
            lambda leaf, place: leaf.astype(dtype) if any(place.spec) else leaf,
            laid(tree, on),
            shardings(tree, on),
        ),
        on,
    )


def of(tree: Any) -> AbstractMesh | None:
    """The mesh on which the first array of a tree lies; None for one device. In jit, too."""
    mesh = jax.typeof(jax.tree.leaves(tree)[0]).sharding.mesh
    return mesh if set(ROWS) <= set(mesh.axis_names) else None


def rows(tree: Any, on: AbstractMesh | None, *, axis: int = 0) -> Any:
    """Arrays of a batch, or what is computed of it, their rows split over all devices; in jit.

    Rows that the devices do not divide, of which training has none, lie as XLA likes.
    """
    if on is None or jax.tree.leaves(tree)[0].shape[axis] % on.size:
        return tree
    split = NamedSharding(on, PartitionSpec(*[None] * axis, ROWS))
    return jax.lax.with_sharding_constraint(tree, split)


def everywhere(tree: Any, on: AbstractMesh | None) -> Any:
    """Results that each process can read: whole on every device; in jit."""
    if on is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(on, PartitionSpec()))


@jax.custom_vjp
def whole(x: Shaped[Array, "*_"]) -> Shaped[Array, "*_"]:
    """x gathered on every device. Its gradient need not be: it lies as what x was made of does."""
    mesh = of(x)
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


whole.defvjp(lambda x: (whole(x), None), lambda _, gradient: (gradient,))


def is_split(x: Shaped[Array, "*_"]) -> bool:
    """Whether it lies on a mesh that splits weights."""
    mesh = of(x)
    return mesh is not None and mesh.shape["fsdp"] > 1


def bytes_per_device(tree: Any) -> int:
    """What each device holds of arrays, or of ShapeDtypeStructs that say where they will be."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
