"""The loss on many devices: each of them takes some of the tokens, and all classes.

XLA cannot split a kernel: given arrays of a mesh it would gather them, and every device would
compute everything. So the split is made here, whatever the backend: a call on arrays of a mesh
becomes a `shard_map` over as many of its axes as divide the tokens, with the whole head on every
device. Gradients of the head and the bias are summed over the devices once, at the end.

A call inside somebody else's `shard_map` is that device's own; there remains to say that its
results differ from device to device, so that JAX knows what to sum.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lsce.problem import Problem


def token_losses(backend: Any, problem: Problem, *arrays: Any) -> Any:
    """`backend.token_losses`, on all devices that the arrays lie on."""
    mesh = _mesh(arrays)
    if mesh is None:
        return backend.token_losses(problem, *varying(arrays, like=arrays))
    call = _on_devices(backend, False, problem, mesh)
    hidden, head, labels, bias, vocab_order = arrays
    return call((hidden, labels), (head, bias, vocab_order))


def weighted_sum(backend: Any, problem: Problem, *arrays: Any) -> Any:
    """`backend.weighted_sum`, likewise."""
    mesh = _mesh(arrays)
    if mesh is None:
        return backend.weighted_sum(problem, *varying(arrays, like=arrays))
    call = _on_devices(backend, True, problem, mesh)
    hidden, head, labels, weights, bias, vocab_order = arrays
    totals, stats = call((hidden, labels, weights), (head, bias, vocab_order))
    return totals.sum(), stats


def _mesh(arrays: Any) -> Any:
    """The mesh of devices on which some of the arrays lie, outside any `shard_map`.

    None for one device, unless the mesh is explicit: its arrays carry shardings all the same, which
    backends know nothing of.
    """
    for x in jax.tree.leaves(arrays):
        mesh = jax.typeof(x).sharding.mesh
        if _is_explicit(mesh) or (mesh.size > 1 and AxisType.Manual not in mesh.axis_types):
            return mesh
    return None


def _is_explicit(mesh: Any) -> bool:
    """Whether arrays carry their shardings in their types, outside any `shard_map`."""
    return AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types


def _axes(mesh: Any, n: int) -> tuple[str, ...]:
    """The axes that n tokens are split over: as many as divide them."""
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
    """x of any leading axes as [n, …]; on an explicit mesh split as the tokens will be.

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
    axes = _axes(mesh, problem.n)
    devices = math.prod(mesh.shape[name] for name in axes)
    local = dataclasses.replace(problem, n=problem.n // devices)
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
        if _is_explicit(mesh):
            tokens = jax.reshard(tokens, _explicitly(mesh, axes))
            shared = jax.reshard(shared, NamedSharding(mesh, whole))
        return split(tokens, shared)

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
