"""The shapes of models, by name. Importing this loads no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, and how it computes. Weights are float32 whatever `dtype` says."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-5
    tied_head: bool = True
    """The head is the embedding table; otherwise it has weights of its own."""
    dropout: float = 0.0
    """On the embeddings and on what each attention and MLP adds to the residual stream."""
    dtype: str = "float32"
    """The dtype of activations and matmuls; norms and softmaxes are float32 inside."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads=} must be a multiple of {self.kv_heads=}")
        if self.head_size % 2:
            raise ValueError(f"{self.head_size=} must be even: RoPE turns pairs of features")


PRESETS: Mapping[str, ModelConfig] = {
    "nano": ModelConfig(
        vocab_size=8192, hidden_size=64, layers=2, heads=4, kv_heads=2, head_size=16, mlp_size=192
    ),
    "tiny": ModelConfig(
        vocab_size=8192, hidden_size=128, layers=4, heads=4, kv_heads=2, head_size=32, mlp_size=384
    ),
    "small": ModelConfig(
        vocab_size=8192, hidden_size=512, layers=8, heads=8, kv_heads=4, head_size=64, mlp_size=1408
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_size=64,
        mlp_size=1536,
        rope_theta=1e5,
    ),
}
"""Shapes by name. The trainer replaces `vocab_size` by its tokenizer's."""
