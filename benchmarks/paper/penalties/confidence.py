"""The confidence penalty: entropy is rewarded, by β nats for each.

Source: Pereyra et al. 2017, https://arxiv.org/abs/1701.06548.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.paper.penalties.penalised import Penalised


def penalty(z: Float[Array, "N V"]) -> Float[Array, " N"]:
    """−H = Σ p log p."""
    log_p = jax.nn.log_softmax(z, axis=1)
    return jnp.sum(jnp.exp(log_p) * log_p, axis=1)


BACKEND = Penalised("confidence-penalty", penalty)
