"""Weights from files: what is wrong is named before anything is allocated; formats agree."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from oracles.inputs import weights
from safetensors.numpy import save_file

from train.models import families
from train.models.attention import frequencies
from train.models.config import ModelConfig, Rope
from train.models.families.names import Form, Place
from train.models.weights.gguf import GGUFFile, _query_scale
from train.models.weights.load import load, save, shapes
from train.models.weights.safetensors import SafetensorsFolder

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
GEMMA = {
    **{name: LLAMA[name] for name in LLAMA if name not in ("rope_theta", "rope_scaling")},
    "model_type": "gemma3_text",
    "sliding_window": 7,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": True,
}


def config_of(config: dict) -> ModelConfig:
    return families.read(config, "config.json")


def places_of(config: dict, form: Form = "huggingface") -> dict[str, Place]:
    return families.places(config_of(config), shapes(config_of(config)), form)


def tensors_of(config: dict) -> dict[str, np.ndarray]:
    sizes = {name: place.shape for name, place in places_of(config).items()}
    return weights(sizes, zero_centred=config["model_type"].startswith("gemma"))


def folder(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path


def leaves(state: nnx.State) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_untouched_model_is_given_back_to_the_bit(tmp_path, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of(LLAMA).items()}
    files = SafetensorsFolder(folder(tmp_path, tensors))
    assert files.dtype == np.dtype(dtype).name
    params = load(config_of(LLAMA), files, "huggingface")
    assert {leaf.dtype for leaf in leaves(params)} == {np.dtype(np.float32)}
    back = dict(save(config_of(LLAMA), params, files.dtype))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor)


def test_shards_give_what_one_file_gives(tmp_path):
    tensors = tensors_of(LLAMA)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = load(config_of(LLAMA), SafetensorsFolder(folder(whole, tensors)), "huggingface")
    names = sorted(tensors)
    index = {}
    for number, some in enumerate((names[:7], names[7:])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in some}, parts / file)
        index |= dict.fromkeys(some, file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = load(config_of(LLAMA), SafetensorsFolder(parts), "huggingface")
    for one, other in zip(leaves(expected), leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)

    index_file = parts / "model.safetensors.index.json"
    index_file.rename(parts / "aside")
    with pytest.raises(
        ValueError, match=r"holds model-0\.safetensors to model-1\.safetensors \(2\)"
    ):
        SafetensorsFolder(parts)
    (parts / "aside").rename(index_file)

    (parts / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-1\.safetensors, which is not there"):
        SafetensorsFolder(parts)
    index[names[0]] = "model-1.safetensors"
    save_file({name: tensors[name] for name in names[7:]}, parts / "model-1.safetensors")
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=r"is in model-1\.safetensors; it is not"):
        SafetensorsFolder(parts)
    index[names[0]] = "../secret.safetensors"
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=r"\.\./secret"):
        SafetensorsFolder(parts)
    (parts / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no index of safetensors"):
        SafetensorsFolder(parts)


def test_what_does_not_fit_the_shape_is_named_with_both_shapes(tmp_path):
    tensors = tensors_of(LLAMA)
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # computed
    with pytest.raises(ValueError, match="is missing") as raised:
        load(config_of(LLAMA), SafetensorsFolder(folder(tmp_path, tensors)), "huggingface")
    message = str(raised.value)
    assert message.startswith(str(tmp_path))
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.norm.weight is [31] and must be [32]" in message
    assert "model.layers.0.self_attn.q_proj.bias has no place in a llama" in message
    assert "inv_freq" not in message


def test_a_tied_head_that_is_also_stored_must_be_the_embedding(tmp_path):
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = tensors_of(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config = config_of(tied)
    params = load(config, SafetensorsFolder(folder(tmp_path, tensors)), "huggingface")
    assert "lm_head.weight" not in dict(save(config, params, "float32"))
    tensors["lm_head.weight"][3, 5] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load(config, SafetensorsFolder(folder(tmp_path, tensors)), "huggingface")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path, dtype, value, name):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of(LLAMA).items()}
    tensors[name].flat[[0, 17]] = value
    files = SafetensorsFolder(folder(tmp_path, tensors))
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/model\.safetensors: {name} is NaN or infinite in 2 "
    ):
        load(config_of(LLAMA), files, "huggingface")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: data[:-8], "is truncated or corrupt"),
        (lambda data: data[:20], "is truncated or corrupt"),
        (lambda data: b"", "is truncated or corrupt"),
        (lambda data: b"\xff" * 100, "is truncated or corrupt"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
    ],
)
def test_a_damaged_safetensors_file_is_named(tmp_path, content, message):
    file = folder(tmp_path, {"a": np.ones((4, 4), np.float32)}) / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as raised:
        SafetensorsFolder(tmp_path)
    assert str(file) in str(raised.value)


def test_pickles_and_quantized_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no model\.safetensors"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(ValueError, match="holds I8: quantized"):
        SafetensorsFolder(folder(tmp_path, {"a": np.ones(4, np.int8)}))


KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


def write_gguf(
    path: Path,
    config: dict,
    quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    factors: np.ndarray | None = None,
) -> Path:
    """What llama.cpp's converter writes: rows of q and k interleaved, 1 in Gemma's norms."""
    architecture = {"llama": "llama", "gemma3_text": "gemma3"}[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    for name, key in KEYS.items():
        if name in config:
            value = config[name]
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{architecture}.{key}", value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    tensors = tensors_of(config)
    by_place = {(p.path, p.layer): n for n, p in places_of(config).items()}
    for name, place in places_of(config, "gguf").items():
        tensor = tensors[by_place[place.path, place.layer]]
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        heads = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        if heads:
            halves = tensor.reshape(config[heads], 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        kind = quantized if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors() -> np.ndarray:
    rope = config_of(LLAMA).rope
    return np.asarray(frequencies(Rope(rope.theta), 8) / frequencies(rope, 8))


@pytest.mark.parametrize(
    ("config", "quantized", "tolerance"),
    [
        (LLAMA, gguf.GGMLQuantizationType.F32, 0),
        (GEMMA, gguf.GGMLQuantizationType.F32, 1e-7),  # 1 is added to norms, and taken off
        (LLAMA, gguf.GGMLQuantizationType.Q8_0, 0.02),
    ],
)
def test_gguf_gives_what_safetensors_give(tmp_path, config, quantized, tolerance):
    factors = llama3_factors() if config is LLAMA else None
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", config, quantized, factors))
    shape = families.read(file.config, str(file.path))
    assert shape == config_of(config)
    found = load(shape, file, "gguf")
    files = SafetensorsFolder(folder(tmp_path, tensors_of(config)))
    for one, other in zip(leaves(found), leaves(load(shape, files, "huggingface")), strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def test_a_weight_in_gguf_that_is_not_finite_is_named_with_its_file(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", GEMMA)
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()  # of the last tensor
    path.write_bytes(data)
    file = GGUFFile(path)
    shape = families.read(file.config, str(path))
    with pytest.raises(ValueError, match=r"model\.gguf: \S+ is NaN or infinite in 1 of "):
        load(shape, file, "gguf")


def test_the_largest_gemma_scales_its_queries_by_its_width():
    """GGUF does not say it: 27B has √(32/4608), the others 1/√head_dim."""
    shape = {"head_dim": 128, "hidden_size": 4608, "num_attention_heads": 32}
    for layers, scalar in ((46, 144), (42, 128)):
        found = _query_scale("gemma2", shape | {"num_hidden_layers": layers})
        assert found == {"query_pre_attn_scalar": scalar}
    assert _query_scale("llama", shape | {"num_hidden_layers": 46}) == {}


def test_factors_of_another_rotary_scaling_are_refused(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", LLAMA, factors=np.linspace(1, 9, 4, dtype="f4"))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not the scaling of Llama 3\.1"):
        GGUFFile(file).config  # noqa: B018


def test_a_damaged_gguf_file_is_named_wherever_it_ends(tmp_path):
    whole = write_gguf(tmp_path / "model.gguf", GEMMA).read_bytes()
    file = tmp_path / "cut.gguf"
    for length in (0, 3, 8, 40, 200, 900, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is truncated or corrupt"):
            GGUFFile(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 99) + bytes(8))
    with pytest.raises(ValueError, match="corrupt: a value is of type 99, which is none"):
        GGUFFile(file)
    random = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole[:1500])
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(256)
        file.write_bytes(data + whole[1500:])
        try:
            found = GGUFFile(file)
            families.read(found.config, "it")
        except ValueError:
            continue
        assert found.shapes


def test_an_unknown_architecture_and_parts_are_refused(tmp_path):
    for values, message in (
        ({"general.architecture": "mamba"}, "no family for GGUF's architecture 'mamba'"),
        ({"split.count": 3}, "is one part of several"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", values.get("general.architecture", "llama"))
        for name, value in values.items():
            if isinstance(value, int):
                writer.add_uint16(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match=message):
            GGUFFile(tmp_path / "m.gguf").config  # noqa: B018
