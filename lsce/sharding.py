"""The loss on many devices: each of them takes some of the tokens, and all classes.

XLA cannot split a kernel: given arrays of a mesh it would gather them, and every device would
compute everything. So the split is made here, whatever the backend: a call on arrays of a mesh
becomes a `shard_map` over all of its axes, with the whole head on every device; where they do not
divide the tokens, some without a loss are added. Gradients of the head and the bias are summed over
the devices once, at the end.

A call inside somebody else's `shard_map` is that device's own; there remains to say that its
results differ from device to device, so that JAX knows what to sum.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lsce.problem import Problem, cdiv

NO_MESH = AbstractMesh((), ())


def token_losses(backend: Any, problem: Problem, *arrays: Any) -> Any:
    """`backend.token_losses`, on all devices that the arrays lie on."""
    mesh = mesh_of(arrays)
    if mesh is None:
        return backend.token_losses(problem, *varying(arrays, like=arrays))
    call = _on_devices(backend, False, problem, mesh)
    hidden, head, labels, bias, vocab_order = arrays
    return call((hidden, labels), (head, bias, vocab_order))


def weighted_sum(backend: Any, problem: Problem, *arrays: Any) -> Any:
    """`backend.weighted_sum`, likewise."""
    mesh = mesh_of(arrays)
    if mesh is None:
        return backend.weighted_sum(problem, *varying(arrays, like=arrays))
    call = _on_devices(backend, True, problem, mesh)
    hidden, head, labels, weights, bias, vocab_order = arrays
    totals, stats = call((hidden, labels, weights), (head, bias, vocab_order))
    return totals.sum(), stats


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
    return dataclasses.replace(problem, n=cdiv(problem.n, mesh.size))


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
def _on_devices(backend: Any, fused: bool, problem: Problem, mesh: Any) -> Any:
    """(arrays with an entry a token, arrays of all tokens) → what the backend returns."""
    local = of_one_device(problem, mesh)
    missing = local.n * mesh.size - problem.n
    axes = tuple(mesh.axis_names)
    by_token, whole = PartitionSpec(axes), PartitionSpec()

    def on_one(tokens: Any, shared: Any) -> Any:
        head, bias, vocab_order = shared
        if not fused:
            hidden, labels = tokens
            return backend.token_losses(local, hidden, head, labels, bias, vocab_order)
        hidden, labels, weights = tokens
        total, stats = backend.weighted_sum(local, hidden, head, labels, weights, bias, vocab_order)
        return total[None], stats

    split = jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=(by_token, whole),
        out_specs=(by_token, by_token),
        check_vma=False,
    )

    def call(tokens: Any, shared: Any) -> Any:
        if missing:
            hidden, labels, *weights = everywhere(tokens)
            tokens = (_pad(hidden, 0), _pad(labels, -1), *(_pad(w, 0) for w in weights))
        if _is_explicit(mesh):
            tokens = jax.reshard(tokens, _explicitly(mesh, axes))
            shared = everywhere(shared)
        out = split(tokens, shared)
        if not missing:
            return out
        each, stats = everywhere(out)
        stats = jax.tree.map(lambda x: x[: problem.n], stats)
        return each if fused else each[: problem.n], stats

    def everywhere(arrays: Any) -> Any:
        """The same arrays, on an explicit mesh whole on every device."""
        return jax.reshard(arrays, NamedSharding(mesh, whole)) if _is_explicit(mesh) else arrays

    def _pad(x: Any, value: Any) -> Any:
        return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=value)

    return jax.jit(call)


def varying(arrays: Any, *, like: Any) -> Any:
    """`arrays`, inside `shard_map` as varying over the devices as the most varying of `like`.

    The gradient of an input then is the device's own, and JAX sums it where the input was the same
    on all of them.
    """
    axes = frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(like))
    )

    def cast(x: Any) -> Any:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)
