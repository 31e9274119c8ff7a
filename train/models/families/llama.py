"""Llama 2 and 3, SmolLM2: the plain decoder. Llama 3.1 and later scale their rotary positions."""

from __future__ import annotations

from collections.abc import Mapping

from train.models.config import ModelConfig
from train.models.families.fields import Fields, common, rope, silu

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
NAMES: Mapping[str, tuple[str, str]] = {}


def read(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **common(fields),
        **silu(fields),
        rope=rope(fields),
        tied_head=fields.flag("tie_word_embeddings", False),
    )
