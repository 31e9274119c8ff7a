"""MaxSup: the largest logit is held down, where label smoothing holds down the label's.

Source: Zhou et al. 2025, https://arxiv.org/abs/2502.15798.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.paper.penalties.penalised import Penalised


def penalty(z: Float[Array, "N V"]) -> Float[Array, " N"]:
    """z_max − z̄. Of equal logits the first is the largest, for the gradient as for accuracy."""
    likeliest = jnp.argmax(z, axis=1)[:, None]
    return jnp.take_along_axis(z, likeliest, axis=1)[:, 0] - jnp.mean(z, axis=1)


BACKEND = Penalised("maxsup", penalty)
