"""The small parts of a decoder: the embedding, norms, matrices, the MLP."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from train import mesh
from train.models.config import ModelConfig

SORTED_BLOCK = 128
"""Tokens of which equal ones are summed by one matrix product, in the gradient of an embedding."""


def elementwise[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function, recomputed in the backward pass from its inputs.

    It is float32 inside and its inputs are of the activations' dtype, which matrix products keep
    anyway: what is kept beside them would be several times as large, and take longer to write and
    to read than to compute again.
    """
    return jax.checkpoint(function, prevent_cse=False)


def embed(table: Float[Array, "V D"], tokens: Int[Array, "*N"]) -> Float[Array, "*N D"]:
    """The rows of a table; NaN for a token that it has no row for.

    Its gradient has the same bits every time and costs little more than a sort, wherever tokens
    repeat: XLA's own adds with atomics on a GPU, one token's rows after the other.
    """
    return _embed(table.shape[0], table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(size: int, table: Float[Array, "V D"], tokens: Int[Array, "*N"]):
    return jnp.take(table, tokens, axis=0)


def _embed_forward(size: int, table: Float[Array, "V D"], tokens: Int[Array, "*N"]):
    return _embed(size, table, tokens), tokens


def _embed_backward(size: int, tokens: Int[Array, "*N"], cotangent: Float[Array, "*N D"]):
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return sum_by_token(rows, tokens.reshape(-1), size), None


_embed.defvjp(_embed_forward, _embed_backward)


def sum_by_token(
    rows: Float[Array, "N D"], tokens: Int[Array, " N"], size: int
) -> Float[Array, "{size} D"]:
    """For each token the sum of its rows, taken in float32 and rounded once.

    Sorted by token, the rows of one lie together. In blocks a product with [t_i = t_j, j ≤ i] makes
    running sums of each token, a scan hands on those that go on from block to block, and the last
    row of each token then holds its sum: every row of the result is written at most once.
    """
    n, d = rows.shape
    padding = -n % SORTED_BLOCK
    tokens = jnp.pad(tokens.astype(jnp.int32), (0, padding), constant_values=size)
    rows = jnp.pad(rows, ((0, padding), (0, 0)))
    order = jnp.argsort(tokens, stable=True)
    blocks = tokens[order].reshape(-1, SORTED_BLOCK)
    sums = jnp.einsum(
        "bij,bjd->bid",
        jnp.tril(blocks[:, :, None] == blocks[:, None, :]).astype(rows.dtype),
        rows[order].reshape(-1, SORTED_BLOCK, d),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

    begins, ends = blocks[:, 0], blocks[:, -1]
    goes_on = jnp.pad(begins[1:] == ends[:-1], (1, 0))  # from the block before
    through = jnp.pad((begins == ends)[:-1], (1, 0))  # that block is all one token
    before = jnp.pad(sums[:-1, -1], ((1, 0), (0, 0)))

    def join(left: tuple[Array, Array], right: tuple[Array, Array]):
        return left[0] & right[0], jnp.where(right[0], left[1], 0) + right[1]

    start = jnp.where(goes_on[:, None], before, 0)
    _, carried = jax.lax.associative_scan(join, ((goes_on & through)[:, None], start))
    sums += jnp.where((blocks == begins[:, None])[..., None], carried[:, None], 0)

    flat = blocks.reshape(-1)
    last = jnp.pad(flat[1:] != flat[:-1], (0, 1), constant_values=True)
    unused = size + 1 + jnp.arange(flat.size, dtype=jnp.int32)  # each index once: beyond the table
    return (
        jnp.zeros((size, d), rows.dtype)
        .at[jnp.where(last, flat, unused)]
        .set(sums.reshape(-1, d).astype(rows.dtype), mode="drop", unique_indices=True)
    )


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
        @elementwise
        def norm(x, scale):
            wide = x.astype(jnp.float32)
            mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
            normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
            if self.zero_centred:
                return (normed * (1 + scale)).astype(x.dtype)
            return normed.astype(x.dtype) * scale.astype(x.dtype)

        return norm(x, jnp.expand_dims(self.scale[...], range(x.ndim - 1)))


class Mlp(nnx.Module):
    """A gated MLP: down(activation(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.gate = linear(config, config.hidden_size, config.mlp_size, rngs)
        self.up = linear(config, config.hidden_size, config.mlp_size, rngs)
        self.down = linear(config, config.mlp_size, config.hidden_size, rngs, residual=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activation = jax.nn.silu if self.activation == "silu" else gelu

        @elementwise
        def gated(both):
            gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
            return (activation(gate) * up).astype(both.dtype)

        return self.down(gated(side_by_side(x, self.gate, self.up)))


def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³))), as x · σ of twice that.

    XLA would keep tanh's float32 for the backward pass, twice what it is made from.
    """
    return x * jax.nn.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


class Linear(nnx.Linear):
    """x·W + b, and what an adapter adds, where the decoder gave it one."""

    adapter: Callable[[Array], Array] | None = None

    def __call__(self, inputs: Float[Array, "*N D"], out_sharding=None) -> Float[Array, "*N F"]:
        y = super().__call__(inputs, out_sharding)
        return y if self.adapter is None else y + self.adapter(inputs)


def side_by_side(x: Float[Array, "B T D"], *matrices: Linear) -> Float[Array, "B T F"]:
    """[x·W₁ + b₁, x·W₂ + b₂, …], by one product of many tokens.

    Then the gradients of x and of the matrices are one product each too, of cotangents that what
    comes behind writes side by side. The matrices themselves are copied, which for fewer tokens
    than features would be most of the work.
    """
    if x.size < x.shape[-1] ** 2 or any(matrix.adapter is not None for matrix in matrices):
        return jnp.concatenate([matrix(x) for matrix in matrices], axis=-1)
    first = matrices[0]
    kernels = [matrix.kernel[...].astype(first.dtype) for matrix in matrices]
    dimensions = ((x.ndim - 1,), (0,)), ((), ())
    y = first.dot_general(x.astype(first.dtype), jnp.concatenate(kernels, axis=1), dimensions)
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    if not biases:
        return y
    bias = jnp.concatenate([bias[...].astype(first.dtype) for bias in biases])
    return y + jnp.expand_dims(bias, range(x.ndim - 1))


def linear(
    config: ModelConfig,
    size: int,
    out_size: int,
    rngs: nnx.Rngs,
    *,
    bias: bool = False,
    residual: bool = False,
) -> Linear:
    """A matrix [size, out_size] that multiplies in the activations' dtype."""
    # Every block begins as the identity (residual branches end in zeros): on the default run's
    # 250 steps that alone is worth more than a better learning rate.
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    return Linear(
        size,
        out_size,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.weights),
        kernel_init=nnx.initializers.zeros if residual else init,
        dot_general=product,
        rngs=rngs,
    )


def product(
    x: Float[Array, "B T I"], kernel: Float[Array, "I O"], dimensions: Any, **options: Any
) -> Float[Array, "B T O"]:
    """`jax.lax.dot_general`, for which a kernel that is split over devices is gathered.

    In a loop over layers, or where blocks are recomputed, the backward pass gathers it again
    and only shares are kept between. Where layers are lines of a program that recomputes nothing,
    XLA sees that it is the same twice, and keeps it.
    """

    def times(x: Float[Array, "B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "B T O"]:
        return jax.lax.dot_general(x, mesh.whole(kernel), dimensions, **options)

    return (jax.checkpoint(times, prevent_cse=False) if mesh.is_split(kernel) else times)(x, kernel)


def table_init(config: ModelConfig) -> jax.nn.initializers.Initializer:
    """How embeddings and untied heads begin."""
    # The last norm leaves hidden states of size √D, so that logits begin with deviation 1/2, and a
    # tied head, whose first guess is the token that it sees, with no more than √D/2 nats for it.
    return jax.nn.initializers.normal(0.5 * config.hidden_size**-0.5)
