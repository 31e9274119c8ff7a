"""Gemma 2 and Gemma 3 (text): norms on both sides of attention and MLP, windows on most layers.

Gemma 2 bounds scores and logits by softcaps; every second layer has a window. Gemma 3 norms
queries and keys instead, five of six layers have a window, and those turn by a base of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.models.config import ModelConfig
from train.models.families.fields import Fields, common, rope, rope_of, sliding

ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
NAMES: Mapping[str, tuple[str, str]] = {
    "blocks.attention_post_norm.scale": (
        "model.layers.{}.post_attention_layernorm",
        "blk.{}.post_attention_norm",
    ),
    "blocks.mlp_norm.scale": ("model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
    "blocks.mlp_post_norm.scale": (
        "model.layers.{}.post_feedforward_layernorm",
        "blk.{}.post_ffw_norm",
    ),
}
"""`post_attention_layernorm` is here what it says; elsewhere it is the norm before the MLP."""
PICTURES = ("vision_tower.", "multi_modal_projector.")
"""Marks of the tensors that text has no use for."""
TEXT_DEFAULTS: Mapping[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""What the `text_config` of a model that also sees pictures may leave out."""


def read(fields: Fields) -> ModelConfig:
    for name in ("hidden_activation", "hidden_act"):
        fields.refuse(name, "gelu_pytorch_tanh")
    fields.refuse("use_bidirectional_attention", False)
    shape = common(fields) | {
        "head_size": fields.integer("head_dim", 256),
        "window": fields.integer("sliding_window", 4096),
        "query_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "post_norms": True,
        "zero_centred_norms": True,
        "activation": "gelu_tanh",
        "scaled_embedding": True,
        "tied_head": fields.flag("tie_word_embeddings", True),
    }
    versions = {"gemma2": _second, "gemma3_text": _third}
    return ModelConfig(**shape | versions[shape["model_type"]](fields, shape["layers"]))


def _second(fields: Fields, layers: int) -> dict[str, Any]:
    return {
        "rope": rope(fields),
        "sliding": sliding(fields, [i % 2 == 0 for i in range(layers)]),
        "attention_softcap": _cap(fields, "attn_logit_softcapping", 50.0),
        "final_softcap": _cap(fields, "final_logit_softcapping", 30.0),
    }


def _third(fields: Fields, layers: int) -> dict[str, Any]:
    period = fields.integer("sliding_window_pattern", 6)
    parts = fields.part("rope_parameters")
    if parts is not None:
        full, local = parts.part("full_attention"), parts.part("sliding_attention")
        theta = full.number("rope_theta", 1e6) if full else 1e6
        local_theta = local.number("rope_theta", 1e4) if local else 1e4
    else:
        full, local = fields.part("rope_scaling"), None  # of the full layers alone
        theta = fields.number("rope_theta", 1e6)
        local_theta = fields.number("rope_local_base_freq", 1e4)
    return {
        "rope": rope_of(full, theta),
        "local_rope": rope_of(local, local_theta),
        "sliding": sliding(fields, [(i + 1) % period != 0 for i in range(layers)]),
        "qk_norms": True,
        "attention_softcap": _cap(fields, "attn_logit_softcapping", None),
        "final_softcap": _cap(fields, "final_logit_softcapping", None),
    }


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    # Null switches a cap off.
    return fields.number(name, None if name in fields.values else default)
