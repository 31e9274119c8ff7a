"""The small parts of a decoder: norms, matrices, the MLP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from train.models.config import ModelConfig


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) over the last axis, in float32, times a learnt scale.

    Llama rounds to the activations' dtype and multiplies by `scale` then; Gemma multiplies by
    1 + `scale` first ("zero-centred": its scales begin at 0).
    """

    def __init__(self, size: int, config: ModelConfig) -> None:
        self.epsilon = config.norm_epsilon
        self.zero_centred = config.zero_centred_norms
        self.scale = nnx.Param((jnp.zeros if self.zero_centred else jnp.ones)(size))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        if self.zero_centred:
            return (normed * (1 + scale)).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class Mlp(nnx.Module):
    """A gated MLP: down(activation(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.gate = linear(config, config.hidden_size, config.mlp_size, rngs)
        self.up = linear(config, config.hidden_size, config.mlp_size, rngs)
        self.down = linear(config, config.mlp_size, config.hidden_size, rngs, residual=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = self.gate(x)
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate)
        return self.down(gate * self.up(x))


def linear(
    config: ModelConfig,
    size: int,
    out_size: int,
    rngs: nnx.Rngs,
    *,
    bias: bool = False,
    residual: bool = False,
) -> nnx.Linear:
    """A float32 matrix [size, out_size] that multiplies in the activations' dtype."""
    # Every block begins as the identity (residual branches end in zeros): on the default run's
    # 250 steps that alone is worth more than a better learning rate.
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    return nnx.Linear(
        size,
        out_size,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.zeros if residual else init,
        rngs=rngs,
    )


def table_init(config: ModelConfig) -> jax.nn.initializers.Initializer:
    """How embeddings and untied heads begin."""
    # The last norm leaves hidden states of size √D, so that logits begin with deviation 1/2, and a
    # tied head, whose first guess is the token that it sees, with no more than √D/2 nats for it.
    return jax.nn.initializers.normal(0.5 * config.hidden_size**-0.5)
