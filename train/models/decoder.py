"""A decoder of the Llama kind in Flax NNX: tokens in, hidden states and head out, never logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from train.models.config import ModelConfig


class Llama(nnx.Module):
    """The decoder: embedding, blocks of attention and MLP, a last norm.

    The model holds parameters and nothing else: randomness comes in with each call. The blocks
    are one `Block` whose weights have a leading axis of layers, so that the time to compile does
    not grow with their number.

    Args:
        config: the shape.
        rngs: the stream `params` initialises the weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            embedding_init=_table_init(config),
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(config.dropout)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = _norm(config, rngs)
        if not config.tied_head:
            shape = (config.vocab_size, config.hidden_size)
            self.untied_head = nnx.Param(_table_init(config)(rngs.params(), shape))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """The hidden states whose product with `head` gives the logits.

        A token attends to itself and to earlier tokens of its row with the same segment number.

        Args:
            tokens: token ids in [0, V).
            segments: the segment of each token within its row; 0 marks padding.
            positions: the index of each token within its segment, for RoPE.
            dropout_key: draws the dropout masks; None turns dropout off (evaluation).
        """
        rotation = rope_rotation(positions, self.config.head_size, self.config.rope_theta)
        mask = attention_mask(segments)
        first_key, keys = None, None
        if dropout_key is not None and self.config.dropout > 0:
            first_key, key = jax.random.split(dropout_key)
            keys = jax.random.split(key, self.config.layers)

        def layer(stream, inputs):
            block, key = inputs
            return block(stream, rotation, mask, key), None

        if self.config.remat:
            layer = jax.checkpoint(layer)
        stream = _drop(self.dropout, self.embedding(tokens), first_key)
        stream, _ = jax.lax.scan(layer, stream, (self.blocks, keys))
        return self.norm(stream)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output weights, in the dtype of the activations: logits are hidden · headᵀ."""
        weights = self.embedding.embedding if self.config.tied_head else self.untied_head
        return weights[...].astype(self.config.dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        stream: Float[Array, "B T D"],
        rotation: tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]],
        mask: Bool[Array, "B 1 T T"],
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        added = self.attention(self.attention_norm(stream), rotation, mask)
        stream = stream + _drop(self.dropout, added, keys[0])
        added = self.mlp(self.mlp_norm(stream))
        return stream + _drop(self.dropout, added, keys[1])


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions: `heads` queries share `kv_heads` keys."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        inner = config.heads * config.head_size
        self.query = _linear(config, config.hidden_size, inner, rngs)
        self.key = _linear(config, config.hidden_size, config.kv_heads * config.head_size, rngs)
        self.value = _linear(config, config.hidden_size, config.kv_heads * config.head_size, rngs)
        self.out = _linear(config, inner, config.hidden_size, rngs, residual=True)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]],
        mask: Bool[Array, "B 1 T T"],
    ) -> Float[Array, "B T D"]:
        heads = (*x.shape[:2], -1, self.config.head_size)
        query = apply_rope(self.query(x).reshape(heads), rotation)
        key = apply_rope(self.key(x).reshape(heads), rotation)
        value = self.value(x).reshape(heads)
        mixed = attend(query, key, value, mask)
        return self.out(mixed.reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _linear(config, config.hidden_size, config.mlp_size, rngs)
        self.up = _linear(config, config.hidden_size, config.mlp_size, rngs)
        self.down = _linear(config, config.mlp_size, config.hidden_size, rngs, residual=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B 1 T T"],
) -> Float[Array, "B T N H"]:
    """softmax(query · keyᵀ / √H) · value, where N/K queries share a key; the softmax is float32.

    Heads come before tokens inside: on a CPU the gradient takes half the time that it takes
    `jax.nn.dot_product_attention`.
    """
    shared = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.einsum("bnth,bnsh->bnts", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores / query.shape[-1] ** 0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("bnts,bnsh->bnth", weights, value), 1, 2)


def attention_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """True where query t may see key s: s ≤ t, in the same segment.

    Padding sees the padding before it, so that no row of the softmax is empty.
    """
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tri(segments.shape[1], dtype=bool)
    return (same & causal[None])[:, None]


def rope_rotation(
    positions: Int[Array, "B T"], head_size: int, theta: float
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """cos and sin of positions · θ^(−2i/H) for the H/2 pairs i of a head, float32.

    Source: RoFormer (Su et al. 2021), https://arxiv.org/abs/2104.09864.
    """
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], rotation: tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]
) -> Float[Array, "B T N H"]:
    """Turn each pair (x_i, x_{i+H/2}) by its angle: the pairing of Hugging Face's Llama."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _table_init(config: ModelConfig) -> jax.nn.initializers.Initializer:
    # The last norm leaves hidden states of size √D, so that logits begin with deviation 1/2, and a
    # tied head, whose first guess is the token that it sees, with no more than √D/2 nats for it.
    return jax.nn.initializers.normal(0.5 * config.hidden_size**-0.5)


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.norm_epsilon,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def _linear(
    config: ModelConfig, size: int, out_size: int, rngs: nnx.Rngs, *, residual: bool = False
) -> nnx.Linear:
    # Every block begins as the identity (residual branches end in zeros): on the default run's
    # 250 steps that alone is worth more than a better learning rate.
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    return nnx.Linear(
        size,
        out_size,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.zeros if residual else init,
        rngs=rngs,
    )


def _drop(
    dropout: nnx.Dropout, x: Float[Array, "B T D"], key: PRNGKeyArray | None
) -> Float[Array, "B T D"]:
    return dropout(x, deterministic=key is None, rngs=key)
