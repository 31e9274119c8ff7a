"""Every family against transformers' own numbers, from a folder such as a user has.

`tests/oracles/make.py` made these numbers; the weights come from the same seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from oracles.inputs import FAMILIES, LENGTHS, POSITIONS, sequences, weights

from train.models import families
from train.models.config import ModelConfig, Rope
from train.models.weights import safetensors
from train.models.weights.load import abstract, load
from train.models.weights.safetensors import SafetensorsFolder

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CASES = sorted({name.split("/")[0] for name in np.load(FAMILIES).files})


@functools.cache
def oracle() -> dict[str, np.ndarray]:
    return dict(np.load(FAMILIES))


def config_json(case: str) -> dict:
    return json.loads(str(oracle()[f"{case}/config"]))


def tensors(case: str) -> dict[str, np.ndarray]:
    shapes = json.loads(str(oracle()[f"{case}/shapes"]))
    return weights(shapes, zero_centred=case.startswith("gemma"))


@functools.partial(jax.jit, static_argnames="graphdef")
def hidden_and_logits(graphdef, params, tokens, segments, positions):
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, segments, positions)
    logits = hidden @ model.head.T
    cap = model.config.final_softcap
    return hidden, logits if cap is None else cap * jax.numpy.tanh(logits / cap)


def run(config: ModelConfig, params: nnx.State) -> list[tuple[np.ndarray, np.ndarray]]:
    """Hidden states and logits of each sequence: both packed into a row, with padding around."""
    lengths = [5, LENGTHS[1], LENGTHS[0], 2]
    ids = sequences(config.vocab_size)
    parts = [np.zeros(5, int), ids[1], ids[0], np.zeros(2, int)]
    tokens = np.concatenate(parts)[None]
    segments = np.repeat([0, 1, 2, 0], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    graphdef = nnx.graphdef(abstract(config))
    outputs = hidden_and_logits(graphdef, params, tokens, segments, positions)
    short, long = slice(5, 5 + LENGTHS[1]), slice(5 + LENGTHS[1], sum(lengths) - 2)
    return [tuple(np.asarray(output[0, part]) for output in outputs) for part in (long, short)]


def folder_of(case: str, path: Path) -> Path:
    safetensors.save(tensors(case).items(), path)
    (path / "config.json").write_text(json.dumps(config_json(case)))
    return path


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits_are_those_of_transformers(case, tmp_path):
    config = families.read(config_json(case), case)
    params = load(config, SafetensorsFolder(folder_of(case, tmp_path)), "huggingface")
    for i, found in enumerate(run(config, params)):
        for what, values in zip(("hidden", "logits"), found, strict=True):
            expected = oracle()[f"{case}/{what}{i}"]
            assert np.abs(expected).max() > 0.5
            np.testing.assert_allclose(values[POSITIONS[i]], expected, rtol=0, atol=2e-4)


OFF = {
    "llama": {"rope": Rope(1.01e5)},
    "llama 3.1, tied": {"rope": Rope(5e5)},
    "mistral": {"window": 10},
    "qwen 3": {"query_scale": 32**-0.5},
    "gemma 2": {"attention_softcap": 5.5},
    "gemma 3": {"local_rope": None},
}
"""What is wrong by a little, such as still writes fluently."""


@pytest.mark.parametrize(
    "case",
    [c if "gemma" not in c else pytest.param(c, marks=pytest.mark.slow) for c in OFF],
)
def test_the_numbers_tell_what_is_wrong_by_a_little(case, tmp_path):
    config = dataclasses.replace(families.read(config_json(case), case), **OFF[case])
    params = load(config, SafetensorsFolder(folder_of(case, tmp_path)), "huggingface")
    found = run(config, params)[0][0][POSITIONS[0]]
    assert np.abs(found - oracle()[f"{case}/hidden0"]).max() > 10 * 2e-4


def test_config_json_of_before_2026_means_the_same():
    old = config_json("llama 3.1, tied")
    scaling = old.pop("rope_parameters")
    old |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    same = families.read(config_json("llama 3.1, tied"), "")
    assert families.read(old, "") == same
    scaling["type"] = scaling.pop("rope_type")
    assert families.read(old, "") == same

    old = config_json("gemma 3")
    parts = old.pop("rope_parameters")
    del old["layer_types"]
    old |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": parts["full_attention"]["factor"]},
    }
    assert families.read(old, "") == families.read(config_json("gemma 3"), "")
    assert families.read(old | {"sliding_window_pattern": 2}, "").sliding[:3] == (True, False, True)

    for case in ("gemma 2", "qwen 2.5"):
        old = config_json(case)
        del old["layer_types"]
        assert families.read(old, "") == families.read(config_json(case), "")


def test_gemma_3_inside_a_model_that_sees_pictures():
    text = config_json("gemma 3")
    for name in ("vocab_size", "num_attention_heads", "num_key_value_heads"):
        del text[name]
    whole = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}
    config = families.read(families.text_part(whole), "")
    assert (config.vocab_size, config.heads, config.kv_heads) == (262_208, 8, 4)
    names = {
        "vision_tower.encoder.weight",
        "model.multi_modal_projector.mm.weight",
        "language_model.model.norm.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    }
    assert families.names_in_file(config, names) == {
        "model.norm.weight": "language_model.model.norm.weight",
        "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
    }


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "no family 'mamba' here; there are gemma2, gemma3_text"),
        ("llama", {"model_type": None}, "has no model_type"),
        ("llama", {"hidden_size": None}, "has no hidden_size"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be a whole number above 0, not '32'"),
        ("llama", {"num_key_value_heads": 3}, "self.heads=4 must be a multiple"),
        *(
            (family, {"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000, more")
            for family in ("llama", "mistral", "qwen 3", "gemma 3")
        ),
        ("llama", {"max_position_embeddings": "many"}, "max_position_embeddings must be a whole"),
        *(
            ("llama", {"rms_norm_eps": value}, "rms_norm_eps must be a finite number above 0, not")
            for value in (float("inf"), float("nan"), -1e-6, 0, 10**400)
        ),
        ("gemma 2", {"final_logit_softcapping": float("inf")}, "must be a finite number above 0"),
        (
            "qwen 2.5",
            {"max_window_layers": "many"},
            "max_window_layers must be a whole number from 0 on, not 'many'",
        ),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type must be default, linear or llama3 for this decoder, not 'yarn'",
        ),
        ("gemma 3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for"),
        ("gemma 3", {"layer_types": ["other"] * 8}, "layer_types must list"),
    ],
)
def test_what_the_decoder_has_not_is_named(case, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        families.read(config_json(case) | changes, "DIR/config.json")
    assert str(raised.value).startswith("DIR/config.json")
