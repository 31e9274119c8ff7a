"""GGUF, llama.cpp's files: their metadata in the words of config.json, weights dequantized."""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from train.models.attention import frequencies
from train.models.config import Rope
from train.models.weights.tensors import broken

MODEL_TYPES = {
    "llama": "llama",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""GGUF's architectures by config.json's names. Mistral is a llama to GGUF."""
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
IDS = {"bos": "bos", "eos": "eos", "padding": "pad"}
ROPE_FACTORS = "rope_freqs.weight"
"""What the frequencies of a Llama 3.1 are divided by: its scaling, computed."""


class GGUFFile:
    """The metadata and the tensors of a file; `Tensors` says what it offers.

    Raises:
      ValueError: naming the file, if it is truncated or corrupt, of several parts, or quantized in
        a way that the package `gguf` cannot undo.
    """

    dtype = "float32"
    narrower: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._metadata, self._tensors = _read_header(path)
        except (ValueError, KeyError, struct.error, OverflowError, MemoryError) as error:
            raise broken(path, error) from None
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        if self.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one part of several: join them with `gguf-split --merge`")
        for name, tensor in self._tensors.items():
            try:
                gguf.dequantize(tensor.data[:1], tensor.kind)
            except NotImplementedError:
                raise ValueError(
                    f"{path}: {name} is {tensor.kind.name}, which cannot be read here"
                ) from None

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        return self._metadata.get(key, default)

    def file_of(self, name: str) -> Path:
        return self.path

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        out = np.empty(tensor.shape, np.float32)
        rows = out.reshape(-1, tensor.shape[-1])
        for start in range(0, len(rows), 4096):  # what is computed between takes little room
            part = slice(start, start + 4096)
            rows[part] = gguf.dequantize(tensor.data[part], tensor.kind)
        return out

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The metadata as a config.json. ValueError for an unknown architecture."""
        architecture = self.get("general.architecture")
        if architecture not in MODEL_TYPES:
            raise ValueError(
                f"{self.path}: there is no family for GGUF's architecture {architecture!r} here;"
                f" there are {', '.join(sorted(MODEL_TYPES))}"
            )
        found = {
            ours: value
            for theirs, ours in KEYS.items()
            if (value := self.get(f"{architecture}.{theirs}")) is not None
        }
        found |= {
            f"{ours}_token_id": value
            for theirs, ours in IDS.items()
            if (value := self.get(f"tokenizer.ggml.{theirs}_token_id")) is not None
        }
        found["model_type"] = MODEL_TYPES[architecture]
        if architecture == "llama" and "sliding_window" in found:
            found["model_type"] = "mistral"
        if "token_embd.weight" in self.shapes:
            found["vocab_size"] = self.shapes["token_embd.weight"][0]
        found["tie_word_embeddings"] = "output.weight" not in self.shapes
        found |= self._rope_scaling(architecture, found) | _query_scale(architecture, found)
        return found

    def _rope_scaling(self, architecture: str, found: Mapping[str, Any]) -> dict[str, Any]:
        kind = self.get(f"{architecture}.rope.scaling.type", "none")
        if kind == "linear":
            factor = self.get(f"{architecture}.rope.scaling.factor", 1.0)
            return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
        if kind != "none":
            raise ValueError(f"{self.path}: rotary scaling {kind!r} is not known here")
        if ROPE_FACTORS not in self.shapes:
            return {}
        divisors = self.read(ROPE_FACTORS)
        plain = Rope(found["rope_theta"])
        scaled = Rope(plain.theta, "llama3", factor=round(float(divisors.max()), 3))
        size = 2 * len(divisors)
        expected = np.asarray(frequencies(plain, size) / frequencies(scaled, size))
        if not np.allclose(divisors, expected, rtol=1e-4):
            raise ValueError(f"{self.path}: {ROPE_FACTORS} is not the scaling of Llama 3.1")
        return {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": scaled.factor,
                "low_freq_factor": scaled.low_frequency_factor,
                "high_freq_factor": scaled.high_frequency_factor,
                "original_max_position_embeddings": scaled.original_length,
            }
        }


def _query_scale(architecture: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF does not say it: 1/√H, but √(heads/D) in the 27B models, as llama.cpp has it too."""
    if not architecture.startswith("gemma"):
        return {}
    largest = found.get("num_hidden_layers") == {"gemma2": 46, "gemma3": 62}[architecture]
    scalar = found.get("head_dim", 256)
    if largest:
        scalar = found["hidden_size"] // found["num_attention_heads"]
    return {"query_pre_attn_scalar": scalar}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray
    """Mapped: [rows, bytes of a row], or [rows, columns] where it is not quantized."""


# By the number of a value's type: gguf.GGUFValueType has the names.
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": np.float32, "F16": np.float16}


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The metadata and the tensors, mapped. Any of struct.error, ValueError, KeyError if corrupt.

    `gguf.GGUFReader` reads the same, but makes arrays of every word of a vocabulary: 11 s and 1 GB
    for Gemma's.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offset = 0

    def scalar(form: str) -> Any:
        nonlocal offset
        (value,) = struct.unpack_from("<" + form, data, offset)
        offset += struct.calcsize(form)
        # Shortest decimals: 1e-6 was written as a float32, which is another number as a float64.
        return float(str(np.float32(value))) if form == "f" else value

    def form_of(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value is of type {kind}, which is none")
        return _SCALARS[kind]

    def string() -> str:
        nonlocal offset
        length = scalar("Q")
        if length > len(data) - offset:
            raise ValueError(f"a text of {length} bytes goes beyond its end")
        offset += length
        return data[offset - length : offset].decode("utf-8", "surrogateescape")

    def value(kind: int) -> Any:
        nonlocal offset
        if kind == _STRING:
            return string()
        if kind != _ARRAY:
            return scalar(form_of(kind))
        element, count = scalar("I"), scalar("Q")
        if count > len(data) - offset:
            raise ValueError(f"a list of {count} values goes beyond its end")
        if element in (_STRING, _ARRAY):
            return [value(element) for _ in range(count)]
        form = f"<{count}{form_of(element)}"
        offset += struct.calcsize(form)
        return list(struct.unpack_from(form, data, offset - struct.calcsize(form)))

    if data[:4] != b"GGUF":
        raise ValueError(f"it begins with {data[:4]!r}, not with GGUF")
    offset = 4
    release = scalar("I")
    if release not in (2, 3):
        raise ValueError(f"its version is {release}; 2 and 3 are known")
    tensor_count, value_count = scalar("Q"), scalar("Q")
    metadata = {}
    for _ in range(value_count):
        key = string()
        metadata[key] = value(scalar("I"))
    infos = []
    for _ in range(tensor_count):
        name = string()
        sizes = [scalar("Q") for _ in range(scalar("I"))]
        infos.append((name, tuple(reversed(sizes)), scalar("I"), scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    first = math.ceil(offset / alignment) * alignment
    tensors = {
        name: _mapped(data, name, shape, gguf.GGMLQuantizationType(kind), first + start)
        for name, shape, kind, start in infos
    }
    return metadata, tensors


def _mapped(
    data: mmap.mmap, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, start: int
) -> _Tensor:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"{name} has the shape {list(shape)}")
    row_bytes = shape[-1] // block * size
    rows = math.prod(shape[:-1])
    if start + rows * row_bytes > len(data):
        raise ValueError(f"{name} goes beyond its end")
    array = np.frombuffer(data, np.uint8, rows * row_bytes, start).reshape(rows, row_bytes)
    return _Tensor(shape, kind, array.view(_PLAIN.get(kind.name, np.uint8)))
