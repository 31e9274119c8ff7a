"""A run from a model in files to an exported folder: what is kept, resumed and given back."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from oracles.inputs import weights
from paths import ROOT
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import AddedToken, models, pre_tokenizers

from train import diagnose, export, generate
from train.config import TrainConfig
from train.data import dataset
from train.models import families, resolve
from train.models.config import PRESETS
from train.models.decoder import Decoder
from train.models.weights import safetensors
from train.models.weights.load import shapes
from train.run import folder as run_folder
from train.run import loop
from train.run import model as run_model
from train.run.prepare import prepare
from train.text.chat import BUILT_IN

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SPECIAL = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 272,  # more rows than tokens
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "something_else": "kept",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Gemma 2 as Hugging Face has them."""
    path = tmp_path_factory.mktemp("gemma")
    config = families.read(CONFIG, "it")
    places = families.places(config, shapes(config), "huggingface")
    tensors = weights({name: p.shape for name, p in places.items()}, zero_centred=True)
    bfloat16 = {name: tensor.astype("bfloat16") for name, tensor in tensors.items()}
    safetensors.save(bfloat16.items(), path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": BUILT_IN["gemma"]}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, "top_p": 0.9}))
    return path


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> Path:
    """A run of two steps from it."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data.jsonl"
    lines = [{"prompt": f"{i} and {i}?", "completion": str(2 * i)} for i in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig.of(
        **{"model": str(checkpoint), "data": (data,), "out": folder / "run", "steps": 2},
        **{"max_length": 96, "held_out": 0.0, "batch_size": 2, "dropout": 0.0},
        **{"learning_rate": 1e-2, "checkpoint_every": 1, "weights": "bfloat16"},
    )
    prepared = prepare(config)
    loaded = jax.tree.map(np.asarray, prepared.state.params)  # before the first step takes them
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"bfloat16", "float32"}
    loop.train(prepared)
    expected = run_model.read(str(checkpoint)).params
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    return folder / "run"


def test_a_run_keeps_what_its_weights_mean(trained, checkpoint):
    kept = json.loads((trained / "model" / "config.json").read_text())
    assert kept == CONFIG | {"dtype": "bfloat16"}
    generation = json.loads((trained / "model" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": [257, 259], "top_p": 0.9}
    flags = json.loads((trained / "run.json").read_text())
    assert flags["softcap"] == 30.0  # the family's, through the one loss


def test_the_weights_of_a_run_are_those_of_its_last_checkpoint(trained, checkpoint):
    before, after = run_model.read(str(checkpoint)), run_model.read(str(trained))
    assert after.shape == before.shape
    moved = [
        np.abs(np.asarray(one) - np.asarray(other)).max()
        for one, other in zip(
            jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True
        )
    ]
    assert min(moved) > 1e-5


def test_any_checkpoint_can_be_taken_and_it_is_said_which(
    trained, checkpoint, tmp_path, capsys, caplog
):
    caplog.set_level("INFO", "train")
    run = shutil.copytree(trained, tmp_path / "run")
    assert export.main([str(run), str(tmp_path / "last")]) == 0
    assert caplog.messages == [f"weights: step 2 of {run} (last)"]
    caplog.clear()
    best = [str(run), str(tmp_path / "best"), "--checkpoint", "best", "--dtype", "float32"]
    assert export.main(best) == 2
    assert "has no best checkpoint" in capsys.readouterr().err
    (run / "best.json").write_text('{"step": 1}')
    assert export.main(best) == 0
    assert caplog.messages == [f"weights: step 1 of {run} (best)"]
    caplog.clear()
    prompt = ["--prompt", "x", "--max-tokens", "1"]
    assert generate.main([str(run), *prompt, "--checkpoint", "1"]) == 0
    assert caplog.messages == [f"weights: step 1 of {run}"]
    assert generate.main([str(checkpoint), *prompt, "--checkpoint", "1"]) == 2
    assert "--checkpoint 1 is for runs" in capsys.readouterr().err
    exported, first, last = (
        jax.tree.leaves(run_model.read(str(where), checkpoint=checkpoint).params)
        for where, checkpoint in ((tmp_path / "best", "last"), (run, "1"), (run, "last"))
    )
    for one, other, later in zip(exported, first, last, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(np.asarray(later) - np.asarray(one)).max() > 1e-5


@pytest.mark.parametrize(
    ("backend", "asked", "used"),
    [
        *(("cpu", "auto", "float32"), ("gpu", "auto", "bfloat16"), ("tpu", "auto", "bfloat16")),
        *(("gpu", "float32", "float32"), ("cpu", "bfloat16", "bfloat16")),
    ],
)
def test_activations_are_bfloat16_but_on_a_cpu(backend, asked, used, monkeypatch):
    config = TrainConfig.of(model="nano", dtype=asked)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert run_model.choose(config, None).shape.dtype == used


def test_a_run_notes_the_dtype_that_it_has(trained):
    assert run_folder.load(trained).model.dtype == "float32"


def test_a_run_s_softcap_is_part_of_its_model(trained, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    flags = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(flags | {"softcap": 7.0}))
    assert run_model.read(str(trained)).shape.final_softcap == flags["softcap"] != 7
    assert run_model.read(str(run)).shape.final_softcap == 7
    export.export(str(run), tmp_path / "out")
    assert run_model.read(str(tmp_path / "out")).shape.final_softcap == 7
    assert "softcap" not in caplog.text


def test_a_softcap_that_no_file_can_say_is_told(checkpoint, tmp_path, monkeypatch, caplog):
    shape = dataclasses.replace(PRESETS["nano"], vocab_size=260, final_softcap=5.0)
    params = nnx.state(Decoder(shape, rngs=nnx.Rngs(0)))
    tokenizer = run_model.read(str(checkpoint)).tokenizer
    loaded = run_model.Loaded(shape, params, tokenizer, families.write(shape))
    monkeypatch.setattr(run_model, "read", lambda *_arguments, **_options: loaded)
    export.export("run", tmp_path / "out")
    assert "logits bounded by --softcap 5, which these files cannot say" in caplog.text
    assert "other tools will take logits as they are" in caplog.text


def test_what_cannot_be_written_is_an_error_of_the_system(trained, tmp_path, monkeypatch, capsys):
    def save_file(*_arguments, **_options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors, "save_file", save_file)
    assert export.main([str(trained), str(tmp_path / "out")]) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            "part-0.safetensors cannot be written: I/O error: No space left on device (os error 28)"
        )
    )
    assert not list(tmp_path.iterdir())


def test_a_run_in_place_of_a_model_is_told_how_to_become_one(trained):
    with pytest.raises(ValueError, match=r"run is a run: python -m train\.export .* makes a model"):
        run_model.choose(TrainConfig.of(model=str(trained)), None)


def test_the_loss_can_be_over_the_tokenizer_s_tokens_only(trained, checkpoint, tmp_path):
    resumed = run_folder.load(trained).replace(smooth_known_tokens=True, resume=True)
    new = TrainConfig.of(model=str(checkpoint), smooth_known_tokens=True)
    for config, out in ((new, None), (resumed, trained)):
        shape = run_model.choose(config, out).shape
        assert (shape.known_tokens, shape.vocab_size) == (260, 272)
    with pytest.raises(ValueError, match="each row of nano's head is a token's"):
        run_model.choose(TrainConfig.of(model="nano", smooth_known_tokens=True), None)
    full = shutil.copytree(checkpoint, tmp_path / "full")
    tokenizer = tokenizers.Tokenizer.from_file(str(full / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(12)])
    tokenizer.save(str(full / "tokenizer.json"))
    with pytest.raises(ValueError, match="would change nothing: each of the head's 272 rows"):
        run_model.choose(TrainConfig.of(model=str(full), smooth_known_tokens=True), None)


def test_a_damaged_checkpoint_is_one_line(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for file in run.glob("checkpoints/2/state/**/d/*"):
        os.truncate(file, 10)
    command = [sys.executable, "-m", "train.generate", str(run), "--prompt", "x"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert "checkpoints/2/state cannot be read: " in process.stderr
    assert process.stderr.count("\n") == 1


def test_a_run_goes_on_without_the_files_that_it_began_with(trained, checkpoint, tmp_path):
    config = run_folder.load(trained).replace(resume=True, model=str(tmp_path / "gone"))
    chosen = run_model.choose(config, trained)
    assert chosen.source is None
    assert chosen.shape.model_type == "gemma2"
    assert chosen.tokenizer is not None


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_weights_in_files(
    trained, checkpoint, tmp_path
):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    prepared = prepare(run_folder.load(run).replace(resume=True))
    prepared.checkpointer.__exit__()
    assert prepared.first_step == 0
    expected = run_model.read(str(checkpoint)).params
    for one, other in zip(
        jax.tree.leaves(prepared.state.params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_each_tensor_is_given_back_in_the_dtype_that_it_had(checkpoint, trained, tmp_path):
    """Norms in float32 beside matrices in bfloat16; and so from a run of such a folder."""
    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoint, mixed)
    tensors = load_file(mixed / "model.safetensors")
    wide = {name: t.astype("float32") if t.ndim == 1 else t for name, t in tensors.items()}
    safetensors.save(wide.items(), mixed)
    export.export(str(mixed), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype.name for t in after.values()} == {"bfloat16", "float32"}
    for name, tensor in wide.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["dtype"], run_model.NARROWER in told) == ("float32", False)

    config = run_folder.load(trained).replace(model=str(mixed), out=tmp_path / "run", steps=1)
    loop.run(config.replace(weights="float32"))
    export.export(str(tmp_path / "run"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {n: t.dtype for n, t in again.items()} == {n: t.dtype for n, t in wide.items()}
    export.export(str(tmp_path / "run"), tmp_path / "all", dtype="float32")
    every = load_file(tmp_path / "all" / "model.safetensors")
    assert {t.dtype.name for t in every.values()} == {"float32"}


def test_an_untouched_model_is_exported_to_the_bit(checkpoint, tmp_path):
    export.export(str(checkpoint), tmp_path / "out")
    before = safetensors.SafetensorsFolder(checkpoint)
    after = safetensors.SafetensorsFolder(tmp_path / "out")
    assert after.shapes == before.shapes
    assert after.dtype == before.dtype == "bfloat16"
    for name in before.shapes:
        np.testing.assert_array_equal(after.read(name), before.read(name))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIG | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="is there already"):
        export.export(str(checkpoint), tmp_path / "out")


def test_a_trained_model_is_exported_and_loaded_again(trained, tmp_path):
    export.export(str(trained), tmp_path / "out", dtype="float32")
    before, after = run_model.read(str(trained)), run_model.read(str(tmp_path / "out"))
    assert after.shape == before.shape
    for one, other in zip(
        jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert after.tokenizer.encode_text("17!") == before.tokenizer.encode_text("17!")
    assert after.tokenizer.stops == before.tokenizer.stops


@pytest.fixture(scope="module")
def adapted(trained, checkpoint) -> Path:
    """A run of two steps from it that trains adapters, one of them the head's."""
    config = TrainConfig.of(
        **{"model": str(checkpoint), "data": (trained.parent / "data.jsonl",), "steps": 2},
        **{"out": trained.parent / "adapted", "max_length": 96, "held_out": 0.0, "batch_size": 2},
        **{"dropout": 0.1, "learning_rate": 1e-2, "checkpoint_every": 1},
        **{"lora_rank": 2, "lora_alpha": 8.0, "lora_targets": ("attention.*", "head")},
        lora_dropout=0.25,
    )
    loop.run(config)
    return trained.parent / "adapted"


def test_adapters_learn_and_what_they_are_on_stays(adapted, checkpoint):
    base = dict(jax.tree.leaves_with_path(run_model.read(str(checkpoint)).params))
    params = run_model.read(str(adapted), merge=False).params
    after = dict(jax.tree.leaves_with_path(params))
    for path, weight in base.items():
        np.testing.assert_array_equal(after.pop(path), weight)
    assert len(after) == 10  # A and B of four projections and the head
    for path, weight in after.items():
        assert np.abs(weight).max() > 1e-3, path


@pytest.fixture(scope="module")
def resumed(adapted) -> Path:
    """The same, its second step after an interruption; compiled as the first run is."""
    run = shutil.copytree(adapted, adapted.with_name("resumed"))
    shutil.rmtree(run / "checkpoints" / "2")
    loop.run(run_folder.load(run).replace(resume=True, out=run))
    return run


def test_a_run_of_adapters_goes_on_exactly_and_with_no_others(adapted, resumed):
    one, other = (run_model.read(str(run), merge=False).params for run in (resumed, adapted))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    config = run_folder.load(adapted).replace(resume=True, out=adapted)
    with pytest.raises(ValueError, match="--lora-rank was 2 and is 4"):
        prepare(config.replace(lora_rank=4))


def test_adapters_are_exported_merged_and_as_peft_has_them(adapted, checkpoint, tmp_path):
    export.export(str(adapted), tmp_path / "merged", dtype="float32")
    export.export(str(adapted), tmp_path / "adapter", adapter=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 8.0, 0.25)
    assert config["target_modules"] == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = safetensors.SafetensorsFolder(checkpoint)
    merged = safetensors.SafetensorsFolder(tmp_path / "merged")
    for name in merged.shapes:
        before = base.read("model.embed_tokens.weight" if name == "lm_head.weight" else name)
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in adapter:
            a, b = (adapter.pop(f"{module}.lora_{x}.weight") for x in "AB")
            added = 8.0 / 2 * b.astype(np.float64) @ a
            assert np.abs(added).max() > 1e-4
            np.testing.assert_allclose(merged.read(name), before + added, atol=1e-6)
        else:
            np.testing.assert_array_equal(merged.read(name), before)
    assert not adapter
    written = [*(tmp_path / "merged").iterdir(), *(tmp_path / "adapter").iterdir()]
    assert len({path.stat().st_mode for path in written}) == 1  # who may read one may read all
    found, expected = run_model.read(str(tmp_path / "merged")), run_model.read(str(adapted))
    assert found.shape == expected.shape
    assert not found.shape.tied_head
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_adapters_of_another_softcap_than_their_model_s_say_so(adapted, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    flags = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(flags | {"softcap": 20.0}))
    export.export(str(run), tmp_path / "adapter", adapter=True)
    assert "other tools will bound them by the 30 of the model" in caplog.text


def test_adapters_on_what_peft_cannot_load_say_how_it_can(adapted, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    flags = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(flags | {"model": "smollm2-135m"}))
    export.export(str(run), tmp_path / "adapter", adapter=True)
    assert "python -m train.export smollm2-135m FOLDER makes a folder of it" in caplog.text


def test_adapters_that_are_not_there_or_of_no_use_alone_are_not_exported(trained, tmp_path):
    with pytest.raises(ValueError, match="has no adapters: export it without --adapter"):
        export.export(str(trained), tmp_path / "out", adapter=True)
    assert not list(tmp_path.iterdir())


def test_shards_are_written_one_by_one(tmp_path):
    tensors = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    safetensors.save(tensors.items(), tmp_path, shard_bytes=900)
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    found = safetensors.SafetensorsFolder(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.read(name), tensor)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (generate, ["nano", "--prompt", "x"], "nano is trained from scratch"),
        (
            generate,
            ["nothing", "--prompt", "x"],
            "no run and no model nothing: name a run's folder, ",
        ),
        (
            generate,
            [str(ROOT), "--prompt", "x"],
            f"{ROOT} is neither a run (run.json is missing) nor a model",
        ),
        (generate, ["x" * 300, "--prompt", "x"], "x/run.json: File name too long"),
        (export, ["nothing", "out"], "a GGUF file, or hf:org/name"),
    ],
)
def test_what_has_no_weights_is_named(command, arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_generation(checkpoint, monkeypatch):
    """`train.start.run` makes an exit status of that."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        generate.main([str(checkpoint), "--prompt", "x", "--max-tokens", "1"])


@pytest.mark.parametrize("words", [["--prompt", "\udcff"], ["--prompt", "", "--system", "\udcff"]])
def test_a_prompt_that_is_not_text_is_refused(checkpoint, words, capsys):
    assert generate.main([str(checkpoint), *words]) == 2
    assert r"'\udcff' is not text in UTF-8" in capsys.readouterr().err


def test_positions_that_a_model_has_never_seen_are_told(checkpoint, trained, capsys, caplog):
    prompt = ["--raw", "--prompt", "x" * 129, "--max-tokens", "1"]
    for model in (checkpoint, trained):
        assert generate.main([str(model), *prompt]) == 2
        assert (
            "--prompt has 129 tokens, more than the 128 positions that" in capsys.readouterr().err
        )
    config = run_folder.load(trained).replace(out=None, steps=1, max_length=129)
    prepare(config.replace(out=trained.parent / "long", resume=False))
    assert "--max-length 129 is more than the 128 positions" in caplog.text


def test_a_seed_is_one_that_training_takes(checkpoint, capsys):
    assert generate.main([str(checkpoint), "--prompt", "x", "--seed", str(2**32)]) == 2
    assert "--seed must be in [0, 2**32)" in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_than_the_head_has_rows_is_refused(checkpoint):
    found = resolve.find(str(checkpoint))
    small = dataclasses.replace(found, config_json=CONFIG | {"vocab_size": 255})
    with pytest.raises(ValueError, match="has ids up to 259, and the head only 255 rows"):
        small.tokenizer()
    # What every conversation holds is no token for some of them, though it was added.
    small = dataclasses.replace(found, config_json=CONFIG | {"vocab_size": 259})
    with pytest.raises(ValueError, match=r"in any conversation .* <end_of_turn> \(id 259\)"):
        small.tokenizer()
    small = dataclasses.replace(found, config_json=CONFIG | {"vocab_size": 260})
    assert small.tokenizer().vocab_size == 260


IMAGE = "<image>"


@pytest.fixture(scope="module")
def beyond(checkpoint, tmp_path_factory) -> Path:
    """The same, with a token in its tokenizer that the head has no row for: as Gemma 3's."""
    path = tmp_path_factory.mktemp("beyond") / "model"
    shutil.copytree(checkpoint, path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(12)])
    tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=False)])
    assert tokenizer.token_to_id(IMAGE) == CONFIG["vocab_size"]
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.slow
def test_an_added_token_without_a_row_is_no_fault_of_the_model(beyond, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "train")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    config = TrainConfig.of(
        **{"model": str(beyond), "data": (tmp_path / "data.jsonl",), "out": tmp_path / "run"},
        **{"steps": 1, "max_length": 96, "held_out": 0.0, "batch_size": 2},
    )
    loop.train(prepare(config))
    said = "1 added token(s) have no row in the head, the first is <image> (id 272)"
    assert sum(said in message for message in caplog.messages) == 1
    assert "rows of the head are no token's" not in caplog.text
    export.export(str(tmp_path / "run"), tmp_path / "out")
    before, after = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (beyond, tmp_path / "out")
    )
    assert after == before
    for model in (tmp_path / "out", tmp_path / "run", beyond):
        assert generate.main([str(model), "--prompt", "x", "--max-tokens", "1"]) == 0
        for raw in ([], ["--raw"]):
            capsys.readouterr()
            assert generate.main([str(model), "--prompt", f"x {IMAGE} y", *raw]) == 2
            assert "the text holds the token <image> (id 272)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": f"see {IMAGE}", "completion": "b"},
        {"prompt": "a", "completion": f"{IMAGE}"},
        {"text": f"it is {IMAGE}."},
    ],
)
def test_a_record_that_holds_a_token_without_a_row_is_named_or_left_out(
    beyond, tmp_path, line, caplog
):
    good = {"text": "fine"} if "text" in line else {"prompt": "a", "completion": "b"}
    lines = [good, good, line, good]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"max_length": 96, "batch_size": 2, "vocab_size": 300, "seed": 0, "held_out": 0}
    given |= {"data": [tmp_path / "data.jsonl"], "tokenizer": resolve.find(str(beyond)).tokenizer()}
    refused = r"data\.jsonl:3: the text holds the token <image> \(id 272\), for which the head"
    with pytest.raises(ValueError, match=refused):
        dataset.build(**given)
    data = dataset.build(**given, skip_bad_records=True)
    assert (data.counts.skipped, data.counts.train) == (1, 3)
    assert re.search(refused, caplog.text)
    assert data.train.rows.tokens.max() < CONFIG["vocab_size"]


def test_a_template_or_a_vocabulary_that_does_not_fit_stops_before_anything_is_written(
    checkpoint, tmp_path
):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = {"model": str(checkpoint), "data": (data,), "held_out": 0.0, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=re.escape("--template chatml needs <|im_start|>")):
        prepare(TrainConfig.of(**flags, template="chatml"))
    with pytest.raises(ValueError, match="--vocab-size 300 is for models from scratch"):
        prepare(TrainConfig.of(**flags, vocab_size=300))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_transformers_loads_what_is_exported_with_equal_logits(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="torch reads the exported folder")
    transformers = pytest.importorskip("transformers")
    export.export(str(trained), tmp_path / "out", dtype="float32")
    loaded = run_model.read(str(trained))
    tokens = np.array(loaded.tokenizer.encode_text("What is 2 and 2?"))[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    hidden = loaded.model(tokens, np.ones_like(tokens), np.arange(tokens.size)[None])
    logits = np.asarray(hidden @ loaded.model.head.T)
    cap = loaded.shape.final_softcap
    assert cap == 30.0
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(cap * np.tanh(logits / cap), expected, atol=2e-4)


@pytest.mark.slow
def test_a_run_is_diagnosed(trained, tmp_path, capsys):
    out = tmp_path / "found"
    data = trained.parent / "data.jsonl"
    given = ["--model", str(trained), "--data", str(data), "--max-length", "96"]
    assert diagnose.main([*given, "--tokens", "40", "--out", str(out)]) == 0
    assert "Is smoothing likely to help?" in capsys.readouterr().out
    found = json.loads((out / diagnose.JSON).read_text())
    assert (found["model"], found["data"], found["tokens"]) == ("run", ["data.jsonl"], 40)
    # Not given, the cap is the model's own, as in training.
    cap = json.loads((trained / "run.json").read_text())["softcap"]
    assert found["head"]["softcap"] == cap is not None
    assert found["head"]["vocab_size"] == CONFIG["vocab_size"]
    assert 0 < found["entropy"]["value"] <= np.log(CONFIG["vocab_size"])
    assert (out / diagnose.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert diagnose.main(["--model", str(tmp_path), "--out", str(out)]) == 2
    assert "is neither a run" in capsys.readouterr().err
