"""What weights are called: in this decoder, in Hugging Face's files, in GGUF."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from train.models.config import ModelConfig

Form = Literal["huggingface", "gguf"]
Path = tuple[str, ...]
"""Where a weight is within `nnx.state(decoder)`."""

SHARED: Mapping[str, tuple[str, str]] = {
    "embedding.embedding": ("model.embed_tokens", "token_embd"),
    "blocks.attention_norm.scale": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "blocks.attention.query": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "blocks.attention.key": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "blocks.attention.value": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "blocks.attention.out": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "blocks.attention.query_norm.scale": (
        "model.layers.{}.self_attn.q_norm",
        "blk.{}.attn_q_norm",
    ),
    "blocks.attention.key_norm.scale": ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    "blocks.mlp_norm.scale": ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "blocks.mlp.gate": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "blocks.mlp.up": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "blocks.mlp.down": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    "norm.scale": ("model.norm", "output_norm"),
    "untied_head": ("lm_head", "output"),
}
"""Weights to tensors, without the ".weight" and ".bias" at the tensors' ends."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of a file goes."""

    path: Path
    layer: int | None
    """Which of the stacked layers; None for a weight that is not of a block."""
    shape: tuple[int, ...]
    """In the file."""
    transposed: bool = False
    """Files hold matrices as [out, in], the decoder multiplies by [in, out]."""
    minus_one: bool = False
    """GGUF holds Gemma's norms as 1 + scale."""
    interleaved_heads: int | None = None
    """GGUF of the Llama kind turns neighbouring rows of each of so many heads together, where the
    decoder turns halves."""

    def from_file(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as the decoder has it; a view where nothing is computed."""
        if self.interleaved_heads:
            halves = tensor.reshape(self.interleaved_heads, -1, 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if self.minus_one:
            tensor = tensor - 1
        return tensor.T if self.transposed else tensor

    def to_file(self, weight: np.ndarray) -> np.ndarray:
        """The weight of this layer as Hugging Face's files hold it."""
        return weight.T if self.transposed else weight


def places(
    config: ModelConfig,
    shapes: Mapping[Path, tuple[int, ...]],
    form: Form,
    changed: Mapping[str, tuple[str, str]],
) -> dict[str, Place]:
    """The tensors that a file of this model has, by name.

    Args:
        config: the model's shape.
        shapes: of the decoder's weights, with their leading axis of layers.
        form: whose names and layouts.
        changed: what the family calls otherwise than `SHARED`.
    """
    names = {**SHARED, **changed}
    interleaved = {}
    if form == "gguf" and config.model_type in ("llama", "mistral"):
        interleaved = {"query": config.heads, "key": config.kv_heads}
    found = {}
    for path, shape in shapes.items():
        dotted = ".".join(path)
        module = names.get(dotted) or names[dotted.rpartition(".")[0]]
        name = module[form == "gguf"] + (".bias" if path[-1] == "bias" else ".weight")
        stacked = path[0] == "blocks"
        one = shape[1:] if stacked else shape
        transposed = path[-1] == "kernel"
        for layer in range(config.layers) if stacked else [None]:
            found[name.format(layer)] = Place(
                path,
                layer,
                shape=one[::-1] if transposed else one,
                transposed=transposed,
                minus_one=form == "gguf" and config.zero_centred_norms and path[-1] == "scale",
                interleaved_heads=interleaved.get(path[-2]) if stacked else None,
            )
    return found
