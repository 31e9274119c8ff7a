"""A number as an argument: Python's own, or a scalar of numpy or jax whose value is known."""

import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def number(name: str, value: Any) -> float:
    """`value` as a float. TypeError for anything else, bool and traced numbers among it."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} is traced ({value}); it shapes the program, so pass a Python number"
        )
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    else:
        kinds = jnp.integer, jnp.floating
        real = np.ndim(value) == 0 and any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if not real:
        raise TypeError(f"{name}={value!r}; must be a number")
    return float(value)
