"""Keys and values of the tokens before, so that a new token costs one row and not all of them."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from train.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; with a leading axis of layers, those of all."""

    keys: Float[Array, "*L B S K H"]
    """Turned by their positions already."""
    values: Float[Array, "*L B S K H"]
    length: Int[Array, "*L"]
    """Tokens of each row that are in it."""

    def append(self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]) -> Self:
        """With T more tokens. Those beyond S would overwrite the last: the caller sees to that."""

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis=1)

        return dataclasses.replace(
            self,
            keys=put(self.keys, keys),
            values=put(self.values, values),
            length=self.length + keys.shape[1],
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of a batch of rows, with room for S tokens each.

    Segment 1 is the trunk of a row: 2, 3, … are branches, which go on from it side by side, see it
    and do not see each other.
    """

    layers: LayerCache
    segments: Int[Array, "B S"]
    """The segment of each token; 0 for padding, −1 where there is none yet."""
    positions: Int[Array, "B S"]
    """Each token's position: what a window counts, wherever padding lies."""
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, size: int) -> Self:
        shape = (config.layers, rows, size, config.kv_heads, config.head_size)
        keys, values = (jnp.zeros(shape, config.dtype) for _ in range(2))
        lengths = jnp.zeros(config.layers, jnp.int32)
        nothing, start = jnp.full((rows, size), -1, jnp.int32), jnp.zeros((rows, size), jnp.int32)
        return cls(LayerCache(keys, values, lengths), nothing, start, jnp.int32(0))

    def shared(self, rows: int, room: int) -> Self:
        """The one row of this cache in as many rows, each with room for so many tokens more."""

        def widened(x: Array, axis: int, empty: int = 0) -> Array:
            padding = [(0, room if i == axis + 1 else 0) for i in range(x.ndim)]
            x = jnp.pad(x, padding, constant_values=empty)
            return jnp.broadcast_to(x, (*x.shape[:axis], rows, *x.shape[axis + 1 :]))

        layers = dataclasses.replace(
            self.layers,
            keys=widened(self.layers.keys, 1),
            values=widened(self.layers.values, 1),
        )
        return dataclasses.replace(
            self,
            layers=layers,
            segments=widened(self.segments, 0, -1),
            positions=widened(self.positions, 0),
        )
