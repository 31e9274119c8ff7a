"""Adapters as PEFT has them: a folder that its users load beside the model they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from train.models import families
from train.models.config import ModelConfig
from train.models.lora import matrices
from train.models.weights.safetensors import write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save(config: ModelConfig, params: nnx.State, base: str, folder: Path, dtype: str) -> None:
    """Writes the adapters, and none of the weights that they are on, into a folder.

    Each is lora_A [R, D] and lora_B [F, R] of a module [F, D] of Hugging Face's, whose output gets
    lora_alpha / r · lora_B · (lora_A · x) added.

    Args:
        config: the model's shape, with its adapters.
        params: its weights.
        base: what to call the model that the adapters belong on.
        folder: an empty one.
        dtype: of the files.
    """
    assert config.lora is not None
    tensors: dict[str, np.ndarray] = {}
    modules = set()
    for path, a, b in matrices(config.lora, dict(nnx.to_flat_state(params))).values():
        for name, layer in _modules(config, path):
            modules.add(name.rpartition(".")[2])
            for which, weight in (("A", a), ("B", b)):
                one = np.asarray(weight[...] if layer is None else weight[layer])
                tensor = np.ascontiguousarray(one.T.astype(jax.numpy.dtype(dtype)))
                tensors[f"{PREFIX}{name}.lora_{which}.weight"] = tensor
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "bias": "none",
        "target_modules": sorted(modules),
    }
    write_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", "utf-8")


def _modules(config: ModelConfig, path: tuple[str, ...]) -> list[tuple[str, int | None]]:
    """What Hugging Face calls the module of a weight: one for each layer, or the head."""
    shape = (config.layers, 1, 1) if path[0] == "blocks" else (1, 1)
    places = families.places(config, {path: shape}, "huggingface")
    return [(name.removesuffix(".weight"), place.layer) for name, place in places.items()]
