"""Arguments of a call, each checked by its name before anything is computed."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def array(name: str, value: Any) -> jax.Array:
    """`value` as an array of jax. TypeError for what is none: None, a module, a shape alone."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}={value!r:.80}; must be an array") from error


def number(name: str, value: Any) -> float:
    """`value` as a float: a number of Python's, or a scalar of numpy or jax that is known.

    TypeError for anything else, bool and traced numbers among it.
    """
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


def integer(name: str, value: Any) -> int:
    """`value` as an int: one of Python's or numpy's, no bool. TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r}; must be a Python int")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """`value`, if it is True or False. TypeError for anything else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}; must be True or False")
    return value
