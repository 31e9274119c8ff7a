"""Qwen 2 and 2.5: biases on query, key and value. Qwen 3: norms on query and key, and none.

Their heads have more rows than their tokenizers have tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from train.models.config import ModelConfig
from train.models.families.fields import Fields, common, layers, rope, silu, sliding

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMES: Mapping[str, tuple[str, str]] = {}


def read(fields: Fields) -> ModelConfig:
    third = fields.text("model_type") == "qwen3"
    window = None
    if fields.flag("use_sliding_window", False):
        window = fields.integer("sliding_window", 4096)
    first = fields.count("max_window_layers", 28)
    slides = sliding(fields, [window is not None and i >= first for i in range(layers(fields))])
    shape = common(fields)
    if third:
        shape["head_size"] = fields.integer("head_dim", 128)
    return ModelConfig(
        **shape,
        **silu(fields),
        rope=rope(fields),
        window=window,
        sliding=slides if any(slides) else (),
        qkv_bias=not third,
        qk_norms=third,
        tied_head=fields.flag("tie_word_embeddings", False),
    )
