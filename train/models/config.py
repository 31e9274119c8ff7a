"""The shapes of models, by name. Importing this loads no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

COLUMNS = 64
"""Where a head's columns are no multiple of so many, the loss's kernels copy it."""
MOST_WRITTEN_OUT = 32
"""Layers whose lines a GPU's program may hold: they compile in about a minute."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: pair i of a head turns by θ^(−2i/H) a token, then scaled.

    "linear" divides every frequency by `factor`. "llama3" divides those whose wavelength is longer
    than `original_length` / `low_frequency_factor`, leaves those shorter than `original_length` /
    `high_frequency_factor`, and goes smoothly from one to the other between.
    """

    theta: float = 1e4
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What differs from layer to layer besides the weights."""

    rope: Rope
    window: int | None
    """A token sees itself and the `window` − 1 tokens before it; None: all before it."""


ADAPTED = (
    *("attention.query", "attention.key", "attention.value", "attention.out"),
    *("mlp.gate", "mlp.up", "mlp.down", "head"),
)
"""What an adapter can be on: the projections of all blocks, and the head."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters on a model that stays as it is: see `train.models.lora`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Those of `ADAPTED` that have one."""
    dropout: float = 0.0
    """Probability of dropping a feature of what an adapter reads, in training."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, and how it computes.

    The defaults are Llama's; `train.models.families` has what the others set.
    """

    vocab_size: int
    """Rows of the head. A checkpoint may have more of them than its tokenizer has tokens."""
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int

    model_type: str = "llama"
    """The family, as config.json names it: it says what the weights are called."""
    rope: Rope = Rope()
    local_rope: Rope | None = None
    """RoPE of the layers with a window; None: that of the others."""
    window: int | None = None
    """Tokens that a sliding layer sees, itself included."""
    sliding: tuple[bool, ...] = ()
    """Which layers see no more than `window`; empty: none does."""
    query_scale: float | None = None
    """Scores are query · key · `query_scale`; None: 1/√H."""
    attention_softcap: float | None = None
    """Scores are bounded to ±cap by cap·tanh(score/cap)."""
    final_softcap: float | None = None
    """Logits are bounded so. The loss does it, as the decoder gives hidden states."""
    qkv_bias: bool = False
    qk_norms: bool = False
    """RMS norms over each head of queries and keys, before they turn."""
    post_norms: bool = False
    """A norm also behind attention and MLP, before the residual sum."""
    zero_centred_norms: bool = False
    """Norms multiply by 1 + scale in float32; otherwise by scale, in the activations' dtype."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scaled_embedding: bool = False
    """Embeddings are multiplied by √D, which is rounded to the activations' dtype."""
    norm_epsilon: float = 1e-5
    tied_head: bool = True
    """The head is the embedding table; otherwise it has weights of its own."""
    known_tokens: int | None = None
    """The first rows of the head, over which training's loss is; None: all of them."""
    lora: Lora | None = None
    """Adapters, beside the weights that files have."""

    dropout: float = 0.0
    """On the embeddings and on what each attention and MLP adds to the residual stream."""
    dtype: str = "float32"
    """The dtype of activations and matmuls; norms and softmaxes are float32 inside."""
    weights: str = "float32"
    """The dtype of weights, but for the scales of norms, which are float32."""
    remat: Literal["none", "block", "full"] = "none"
    """What the backward pass recomputes: what is elementwise, each block from its input, or groups
    of about √layers blocks from theirs, each block again within. Each step keeps less."""
    scan: Literal["on", "off"] = "on"
    """Whether blocks are iterations of a loop in the compiled program, or its lines: a GPU runs
    those a fifth faster, but they take longer to compile, and with cuDNN's attention XLA (jax
    0.11.2) fails to make them repeatable."""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """auto: our own kernels where they can, or else cuDNN's, as `attention.choose` says."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads=} must be a multiple of {self.kv_heads=}")
        if self.head_size % 2:
            raise ValueError(f"{self.head_size=} must be even: RoPE turns pairs of features")
        if self.sliding and len(self.sliding) != self.layers:
            raise ValueError(f"{len(self.sliding)=} must be {self.layers=}: one for each layer")
        if any(self.sliding) and not (self.window and self.window > 0):
            raise ValueError(f"{self.window=} must be at least 1: some layers are sliding")
        for name, values in (
            ("weights", ("float32", "bfloat16")),
            ("remat", ("none", "block", "full")),
            ("scan", ("on", "off")),
            ("attention", ("auto", "cudnn", "xla")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {values}")

    @property
    def drops(self) -> bool:
        """Whether training drops anything."""
        return self.dropout > 0 or (self.lora is not None and self.lora.dropout > 0)

    @property
    def head_columns(self) -> int:
        """Columns of hidden states and head: D, and a head's adapter's, padded for the kernels."""
        if self.lora is None or "head" not in self.lora.targets:
            return self.hidden_size
        return math.ceil((self.hidden_size + self.lora.rank) / COLUMNS) * COLUMNS

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        full = LayerKind(self.rope, None)
        local = LayerKind(self.local_rope or self.rope, self.window)
        return tuple(local if slides else full for slides in self.sliding or [False] * self.layers)

    @property
    def pattern(self) -> tuple[LayerKind, ...]:
        """The shortest beginning of `kinds` that gives all of it by repetition."""
        kinds = self.kinds
        return next(
            kinds[:period]
            for period in range(1, len(kinds) + 1)
            if kinds[period:] == kinds[:-period]
        )


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
        rope=Rope(1e5),
    ),
    "gemma3-270m": ModelConfig(
        vocab_size=262144,
        hidden_size=640,
        layers=18,
        heads=4,
        kv_heads=1,
        head_size=256,
        mlp_size=2048,
        model_type="gemma3_text",
        rope=Rope(1e6),
        local_rope=Rope(1e4),
        window=512,
        query_scale=256**-0.5,
        sliding=tuple((i + 1) % 6 != 0 for i in range(18)),
        qk_norms=True,
        post_norms=True,
        zero_centred_norms=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        norm_epsilon=1e-6,
    ),
}
"""Shapes by name. The trainer replaces `vocab_size` by its tokenizer's."""
SHAPES = ("nano", "tiny", "small")
"""What is trained from scratch; the others are the shapes of models that others trained."""
