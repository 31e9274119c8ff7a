"""Mistral: Llama with a window on every layer (the first release) or none (those after)."""

from __future__ import annotations

from collections.abc import Mapping

from train.models.config import ModelConfig
from train.models.families.fields import Fields, common, layers, rope, silu

ARCHITECTURES = {"mistral": "MistralForCausalLM"}
NAMES: Mapping[str, tuple[str, str]] = {}


def read(fields: Fields) -> ModelConfig:
    # Null is no window; a file that says nothing means the first release's.
    window = fields.integer("sliding_window", None if "sliding_window" in fields.values else 4096)
    return ModelConfig(
        **common(fields),
        **silu(fields),
        rope=rope(fields),
        window=window,
        sliding=(True,) * layers(fields) if window else (),
        tied_head=fields.flag("tie_word_embeddings", False),
    )
