"""Families of models: what their config.json means and what their weights are called, a page each.

A page has `ARCHITECTURES` (what config.json calls its models), `read` (config.json to the decoder's
shape), and `NAMES` (its weights, where they are not called as in `names.SHARED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from train.models.config import ModelConfig
from train.models.families import gemma, llama, mistral, qwen
from train.models.families.fields import Fields
from train.models.families.names import Form, Path, Place
from train.models.families.names import places as _places

PAGES = (llama, mistral, gemma, qwen)
HEAD: Mapping[Form, str] = {"huggingface": "lm_head.weight", "gguf": "output.weight"}
EMBEDDING: Mapping[Form, str] = {
    "huggingface": "model.embed_tokens.weight",
    "gguf": "token_embd.weight",
}


def page(model_type: str) -> ModuleType:
    """The family's page; ValueError if there is none."""
    for family in PAGES:
        if model_type in family.ARCHITECTURES:
            return family
    known = ", ".join(sorted(name for family in PAGES for name in family.ARCHITECTURES))
    raise ValueError(f"there is no family {model_type!r} here; there are {known}")


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The decoder's shape, from what a config.json holds, in its old and its new form.

    Raises:
      ValueError: naming `where` and the field, for an unknown family, for what is missing or of the
        wrong type, and for what this decoder has not.
    """
    fields = Fields(config, where)
    try:
        fields.integer("max_position_embeddings", None)  # for `positions`
        return page(fields.text("model_type")).read(fields)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from None


def positions(config: Mapping[str, Any]) -> int | None:
    """The positions that a model was made for; None where its config.json says none."""
    return Fields(config, "config.json").integer("max_position_embeddings", None)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json without what is of pictures: Gemma 3's larger models see them too."""
    if config.get("model_type") != "gemma3" or not isinstance(config.get("text_config"), Mapping):
        return config
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    return {**gemma.TEXT_DEFAULTS, **ids, **config["text_config"]}


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json of a model that began here; the shape must be a plain Llama's.

    What is loaded keeps the config.json that it came with.
    """
    if config.model_type != "llama" or config.rope.scaling != "none":
        raise ValueError(f"only shapes of Llama's kind begin here, not {config.model_type}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied_head,
    }


def places(
    config: ModelConfig, shapes: Mapping[Path, tuple[int, ...]], form: Form
) -> dict[str, Place]:
    """The tensors that a file of this model has: see `names.places`."""
    return _places(config, shapes, form, page(config.model_type).NAMES)


def names_in_file(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """The tensors of a file by the names that `places` has for them.

    Those of a vision tower are left out, by their names; any other stays, to be refused.
    """
    if config.model_type != "gemma3_text":
        return {name: name for name in names}
    found = {}
    for name in names:
        if any(part in name for part in gemma.PICTURES):
            continue
        plain = name.removeprefix("language_model.")
        found[plain.replace("model.language_model.", "model.", 1)] = name
    return found
