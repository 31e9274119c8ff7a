"""Arrays inside `shard_map` as different on each device, which JAX keeps account of."""

from typing import Any

import jax
from jax import lax


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
