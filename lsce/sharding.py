"""The loss on many devices: each of them takes some of the tokens, and all classes.

XLA cannot split a kernel: given arrays of a mesh it would gather them, and every device would
compute everything. So the split is made here, whatever the backend: a call on arrays of a mesh
becomes a `shard_map` over all of its axes, with the whole head on every device; where they do not
divide the tokens, some without a loss are added. Gradients of the head and the bias are summed over
the devices once, at the end.

A call inside somebody else's `shard_map` is that device's own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lsce import loss
from lsce.backends import Arrays
from lsce.problem import Problem, cdiv
from lsce.stats import TokenStats

NO_MESH = AbstractMesh((), ())


def weighted(
    backend: Any, problem: Problem, arrays: Arrays, weights: Float[Array, " N"], *, summed: bool
) -> tuple[Float[Array, " N"] | Float[Array, ""], TokenStats | None]:
    """`lsce.loss.weighted`, on all devices that the arrays lie on."""
    mesh = mesh_of((arrays, weights))
    if mesh is None:
        return loss.weighted(backend, problem, arrays, weights, summed=summed)
    out, stats = _on_devices(backend, problem, mesh, summed)(arrays, weights)
    return (out.sum() if summed else out), stats


def mesh_of(arrays: Any) -> Any:
    """The mesh of devices that a call on these arrays is split over, outside any `shard_map`.

    That is the mesh on which some of them lie, or else the one of `jax.set_mesh` around a `jit`.
    None for one device, unless the mesh is explicit: its arrays carry shardings all the same, which
    backends know nothing of.
    """
    leaves = jax.tree.leaves(arrays)
    meshes = [_own_mesh(x) for x in leaves]
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in leaves):
        meshes.append(jax.sharding.get_abstract_mesh())
    for mesh in meshes:
        if _is_explicit(mesh) or (mesh.size > 1 and AxisType.Manual not in mesh.axis_types):
            return mesh
    return None


def _own_mesh(x: Any) -> Any:
    """The abstract mesh of an array, or of a `jax.ShapeDtypeStruct`; an empty one for none."""
    if isinstance(x, jax.Array):
        return jax.typeof(x).sharding.mesh
    sharding = getattr(x, "sharding", None)
    return sharding.mesh.abstract_mesh if isinstance(sharding, NamedSharding) else NO_MESH


def of_one_device(problem: Problem, mesh: Any) -> Problem:
    """The part of a problem that each device of the mesh computes."""
    if mesh is None:
        return problem
    # At least one token: XLA cannot split what is empty.
    return dataclasses.replace(problem, n=max(1, cdiv(problem.n, mesh.size)))


def _is_explicit(mesh: Any) -> bool:
    """Whether arrays carry their shardings in their types, outside any `shard_map`."""
    return AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types


def _axes(mesh: Any, n: int) -> tuple[str, ...]:
    """As many of the axes as divide n tokens."""
    axes, devices = [], 1
    for name, size in mesh.shape.items():
        if n % (devices * size) == 0:
            axes.append(name)
            devices *= size
    return tuple(axes)


def _explicitly(mesh: Any, axes: tuple[str, ...]) -> NamedSharding:
    """The first dimension split over those of the axes that a sharding may name."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = tuple(name for name in axes if types[name] == AxisType.Explicit)
    return NamedSharding(mesh, PartitionSpec(explicit or None))


def flat(x: Any, n: int, *trailing: int) -> Any:
    """x of any leading axes as [n, …]; on an explicit mesh split as the tokens will be, if it can.

    There a reshape that joins axes needs to be told how its result lies.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not _is_explicit(mesh):
        return x.reshape(n, *trailing)
    return lax.reshape(x, (n, *trailing), out_sharding=_explicitly(mesh, _axes(mesh, n)))


def shaped(x: Any, like: Any) -> Any:
    """x of [N] in the shape of `like`, and on an explicit mesh split as that is."""
    mesh = jax.typeof(x).sharding.mesh
    if not _is_explicit(mesh):
        return x.reshape(like.shape)
    spec = jax.typeof(like).sharding.spec
    return lax.reshape(x, like.shape, out_sharding=NamedSharding(mesh, spec))


@functools.cache
def _on_devices(backend: Any, problem: Problem, mesh: Any, summed: bool) -> Any:
    """(arrays, weights) → (w·L of each token or the sum of each device, statistics)."""
    local = of_one_device(problem, mesh)
    missing = local.n * mesh.size - problem.n
    names = tuple(mesh.axis_names)
    by_token, replicated = PartitionSpec(names), PartitionSpec()
    split = Arrays(by_token, replicated, by_token, replicated, replicated), by_token

    def on_one(arrays: Arrays, weights: Any) -> Any:
        out, stats = loss.weighted(backend, local, arrays, weights, summed=summed)
        return (out[None] if summed else out), stats

    on_all = jax.shard_map(
        on_one, mesh=mesh, in_specs=split, out_specs=(by_token, by_token), check_vma=False
    )

    def call(arrays: Arrays, weights: Any) -> Any:
        if missing:
            arrays, weights = everywhere((arrays, weights))
            arrays = arrays._replace(hidden=pad(arrays.hidden, 0), labels=pad(arrays.labels, -1))
            weights = pad(weights, 0)
        if _is_explicit(mesh):
            lies = _explicitly(mesh, names)
            hidden, labels, weights = jax.reshard((arrays.hidden, arrays.labels, weights), lies)
            arrays = everywhere(arrays._replace(hidden=None, labels=None))
            arrays = arrays._replace(hidden=hidden, labels=labels)
        out, stats = on_all(arrays, weights)
        if not missing:
            return out, stats
        stats = jax.tree.map(lambda x: x[: problem.n], everywhere(stats))
        return out if summed else everywhere(out)[: problem.n], stats

    def everywhere(x: Any) -> Any:
        """The same arrays, replicated on an explicit mesh."""
        return jax.reshard(x, NamedSharding(mesh, replicated)) if _is_explicit(mesh) else x

    def pad(x: Any, value: Any) -> Any:
        return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=value)

    return jax.jit(call)
