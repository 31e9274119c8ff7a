"""Per-token statistics that come out of the same pass as the loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class TokenStats(NamedTuple):
    """What the loss saw at each token, float32, without gradients; logarithms are natural (nats).

    With p = softmax(z) over the V logits z of a token with label y. Ignored tokens hold zeros
    (and `prediction` 0, `correct` False).
    """

    loss: Float[Array, "*tokens"]
    """The token's loss before weights and reduction."""
    lse: Float[Array, "*tokens"]
    """log Σ_v exp z_v."""
    target_logit: Float[Array, "*tokens"]
    """z_y."""
    mean_logit: Float[Array, "*tokens"]
    """(1/V) Σ_v z_v."""
    confidence: Float[Array, "*tokens"]
    """max_v p_v."""
    prediction: Int[Array, "*tokens"]
    """argmax_v z_v, the smallest index among equals; int32."""
    correct: Bool[Array, "*tokens"]
    """prediction == y."""
    entropy: Float[Array, "*tokens"]
    """−Σ_v p_v log p_v."""
    sum_p_squared: Float[Array, "*tokens"]
    """Σ_v p_v²."""
    below_filter: Float[Array, "*tokens"]
    """Σ_v p_v over the classes that the gradient's filter allows to leave out, the most that it
    does leave out: 0 without a filter, and where no gradient is taken."""

    def only(self, live: Bool[Array, "*tokens"]) -> "TokenStats":
        """These statistics with zeros where `live` is False."""
        return jax.tree.map(lambda x: jnp.where(live, x, jnp.zeros_like(x)), self)
