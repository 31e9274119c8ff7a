"""Which gradients a backward pass is asked for, told to it by its forward pass.

With `symbolic_zeros=True` the forward rule of a custom_vjp sees which inputs are frozen. It may not
pass that on as structure of its residuals (None here, an array there): where one function is
differentiated in several ways, JAX takes forward passes from a cache but the structure from the
last one it traced, and a gradient that was asked for comes out zero. The lengths of arrays belong
to the cached pass itself.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Wanted(NamedTuple):
    """The inputs whose gradients are asked for; a frozen one need cost nothing."""

    hidden: bool
    head: bool
    bias: bool
    weights: bool

    @classmethod
    def of(cls, hidden: Any, head: Any, bias: Any | None, weights: Any) -> "Wanted":
        """From the inputs as a forward rule gets them (CustomVJPPrimal; bias may be None)."""
        return cls(*(x is not None and x.perturbed for x in (hidden, head, bias, weights)))

    def as_residuals(self) -> list[Float[Array, "_"]]:
        """An array each, of length 2 for an input that wants its gradient and 1 for a frozen one.

        None is empty: they enter and leave `shard_map`s, and XLA's partitioner (jax 0.11.2) crashes
        the process where an empty array does that on several devices.
        """
        return [jnp.zeros(1 + int(wanted)) for wanted in self]

    @classmethod
    def from_residuals(cls, residuals: list[Float[Array, "_"]]) -> "Wanted":
        """What `as_residuals` was called on."""
        return cls(*[array.size > 1 for array in residuals])
