"""Flags: what they say of themselves, what they refuse, and who may use a run's folder."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT

from train.__main__ import main, parse
from train.config import TrainConfig, described
from train.flags import flag
from train.run import folder as run_folder


def refused(capsys, *arguments: str) -> str:
    """The last line, of a command line that exits with 2. Lines before are the trainer's logs."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *logs, line = printed.err.splitlines()
    assert not any("python -m train" in log for log in logs)
    assert line.startswith("python -m train: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-smoothing", "1.5"], "--label-smoothing must be in [0, 1], not 1.5"),
        (["--label-smoothing", "nan"], "--label-smoothing must be in [0, 1], not nan"),
        (["--temperature", "0"], "--temperature must be finite and more than 0, not 0.0"),
        (
            ["--gradient-filter", "exact"],
            "hidden, none or a number above 0 and below 1, not 'exact'",
        ),
        (["--gradient-filter", "2"], "hidden, none or a number above 0 and below 1, not '2'"),
        (["--softcap", "0"], "--softcap must be finite and more than 0, not 0.0"),
        (["--z-loss", "-1"], "--z-loss must be finite and at least 0, not -1.0"),
        (["--dropout", "1"], "--dropout must be in [0, 1), not 1.0"),
        (["--held-out", "1"], "--held-out must be in [0, 1), not 1.0"),
        (["--learning-rate", "inf"], "--learning-rate must be finite and more than 0, not inf"),
        (["--beta2", "1"], "--beta2 must be in [0, 1), not 1.0"),
        (["--max-length", "7"], "--max-length must be at least 8 tokens, not 7"),
        (["--accumulate", "0"], "--accumulate must be at least 1, not 0"),
        (["--mesh", "2"], "--mesh 2: must be like data=2,fsdp=4: each axis once, "),
        (["--mesh", "fsdp=0"], "--mesh fsdp=0: must be like data=2,fsdp=4"),
        (["--mesh", "data=2,data=2"], "--mesh data=2,data=2: must be like data=2,fsdp=4"),
        (["--mesh", "data=2,model=2"], "--mesh data=2,model=2: must be like data=2,fsdp=4"),
        (["--mesh", "fsdp=3"], "--batch-size 4 must be a multiple of the 3 devices of --mesh fsdp"),
        (["--vocab-size", "100"], "--vocab-size must be at least 262"),
        (["--seed", "-1"], "--seed must be in [0, 2**32), not -1"),
        (["--model", "huge"], "there is no model huge: name one of nano, tiny, small, "),
        (["--template", "chatml"], "--template chatml is for models that others trained: tiny "),
        (["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--data", "x" * 300], f"{'x' * 300}: File name too long"),
        (["--data", "."], ". is a folder: name the files in it"),
        (["--data"], "--data needs a file, or several"),
        (["--eval-data"], "--eval-data needs a file, or several"),
        (["--freeze"], "--freeze needs a pattern, or several"),
        (["--data", "a:2", "b"], "--data: b has no weight and other files have"),
        (["--data", "a", "--data=b"], "--data is given twice: put all files behind one --data"),
        (["--steps", "9", "--epochs", "1"], "--steps 9 and --epochs 1.0 contradict each other"),
        (["--steps", "9", "--warmup-steps", "10"], "--warmup-steps 10 is more than all 9 steps"),
        (["--warmup-steps", "-1"], "--warmup-steps must be at least 0, not -1"),
        (["--held-out", "0", "--eval-every", "5"], "--eval-every 5 needs held-out records"),
        (["--held-out", "0", "--samples", "2"], "--samples 2 needs held-out records"),
        (["--samples", "-1"], "--samples must be at least 0, not -1"),
        (["--resume", "--overwrite"], "--resume and --overwrite contradict each other"),
        (["--resume", "--out", "nowhere"], "there is no run in nowhere"),
        (["--implementation", "magic"], "implementation='magic'; must be one of 'auto', "),
        (["--steps", "many"], "--steps must be a whole number, not 'many'"),
        (["--stepz", "5"], "there is no flag --stepz: did you mean --steps?"),
        (["--reduction", "none"], "--reduction must be one of mean, sum, not 'none'"),
        (["--resume=maybe"], "--resume takes no value: ignored explicit argument 'maybe'"),
        (["train"], "'train' stands behind no flag: see python -m train --help"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_message_before_anything_is_made(
    capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_others_trained_has_the_defaults_of_fine_tuning():
    scratch, tuned = (parse(["--model", name]) for name in ("nano", "smollm2-135m"))
    assert scratch.replace(model="tiny") == TrainConfig()
    assert tuned.optimizer.learning_rate == 2e-5
    assert tuned.model.dropout == tuned.optimizer.weight_decay == 0
    given = parse(["--model", "smollm2-135m", "--learning-rate", "1e-3"])
    assert given.optimizer.learning_rate == 1e-3
    assert given.model.remat == "block"
    evaluated = ["--eval-every", "5"]
    assert [
        parse(["--model", *words]).samples
        for words in (
            ("nano", *evaluated), ("smollm2-135m", *evaluated), ("smollm2-135m",),
            ("smollm2-135m", *evaluated, "--samples", "0"), ("nano", "--samples", "3"),
        )
    ] == [0, 2, 0, 0, 3]  # fmt: skip


def test_every_flag_has_a_help_text_and_the_help_is_complete():
    command = [sys.executable, "-m", "train", "--help"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stderr == ""
    words = " ".join(process.stdout.replace("│", " ").split())
    names = TrainConfig().flags()
    assert len(names) > 30
    for name in names:
        assert words.count(f" {flag(name)} ") >= 1
    # Each flag's text ends by its default.
    assert words.count("(default: ") == len(names)
    assert "None" not in words.replace("None leaves", "")


def test_help_does_not_wait_for_jax():
    code = "import sys, train.__main__; print('jax' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "False\n"


def test_flags_become_the_configuration(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.touch()
    config = parse(["--softcap", "30", "--autotune", "--epochs", "2", "--data", *map(str, files)])
    assert config == TrainConfig.of(softcap=30.0, autotune=True, epochs=2.0, data=tuple(files))


def test_warm_up_is_a_tenth_of_the_run_unless_given():
    assert TrainConfig.of(steps=50).optimizer.steps_of_warmup(50) == 5
    assert TrainConfig.of(steps=5).optimizer.steps_of_warmup(5) == 0
    assert TrainConfig.of(epochs=1, warmup_steps=7).optimizer.steps_of_warmup(7) == 7
    with pytest.raises(ValueError, match="--warmup-steps 7 is more than all 6 steps"):
        TrainConfig.of(epochs=1, warmup_steps=7).optimizer.steps_of_warmup(6)


def test_flags_that_change_training_are_told_from_those_that_do_not():
    before = TrainConfig.of()
    free = TrainConfig.of(out=Path("a"), resume=True, keep=7, log_every=3, eval_every=2)
    assert free.changed_since(before) == {}
    changed = TrainConfig.of(steps=7, beta1=0.5).changed_since(before)
    assert changed == {"steps": (None, 7), "beta1": (0.9, 0.5)}
    assert described({"steps": (3, 7), "beta1": (0.9, 0.5)}) == (
        "--steps was 3 and is 7; --beta1 was 0.9 and is 0.5"
    )
    constant = TrainConfig.of(schedule="constant", warmup_steps=3)
    assert constant.replace(steps=99).changed_since(constant) == {}
    assert constant.replace(warmup_steps=4).changed_since(constant) != {}


def test_a_new_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run_folder.claim(TrainConfig.of(seed=3))
    assert out.parent == Path("runs")
    assert run_folder.load(out) == TrainConfig.of(seed=3, out=out)
    assert run_folder.newest() == out


def test_a_run_is_not_overwritten_unless_asked(tmp_path, capsys):
    out = tmp_path / "run"
    run_folder.claim(TrainConfig.of(out=out))
    run_folder.claim(TrainConfig.of(out=out, seed=1))  # only `run.json` was lost
    (out / "metrics.jsonl").write_text("{}\n")
    assert (
        f"--out {out} holds a run already: give --resume to go on with it, --overwrite to remove"
        in refused(capsys, "--out", str(out))
    )
    assert run_folder.claim(TrainConfig.of(out=out, seed=2, overwrite=True)) == out
    assert [path.name for path in out.iterdir()] == ["run.json"]
    assert run_folder.load(out) == TrainConfig.of(out=out, seed=2)


def test_a_folder_that_is_no_run_is_never_removed(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        message = refused(capsys, "--out", str(tmp_path), *extra)
        assert "is not empty and is not a run: name another folder" in message
    assert (tmp_path / "thesis.tex").exists()
    (tmp_path / "file").touch()
    for out in ("file", "file/run"):
        message = refused(capsys, "--out", str(tmp_path / out))
        assert f"{tmp_path / 'file'} is a file: name a folder" in message


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "run"
    run_folder.claim(TrainConfig.of(out=out))
    for name in ("notes.md", "metrics.jsonl", "eval.json.tmp", "mine/data.jsonl"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}\n")
    data = str(out / "mine" / "data.jsonl")
    message = refused(capsys, "--out", str(out), "--overwrite", "--data", data)
    assert f"--data {data} lies there: move the file, or name another --out" in message
    assert (out / "metrics.jsonl").exists()
    run_folder.claim(TrainConfig.of(out=out, overwrite=True))
    assert {path.name for path in out.iterdir()} == {"run.json", "notes.md", "mine"}
    assert Path(data).read_text() == "{}\n"


def test_two_runs_that_start_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    outs = [run_folder.claim(TrainConfig.of(seed=seed)) for seed in range(3)]
    assert outs == [Path("runs/now"), Path("runs/now-2"), Path("runs/now-3")]
    assert [run_folder.load(out).run.seed for out in outs] == [0, 1, 2]


def test_overwriting_through_a_link_empties_the_folder_behind_it(tmp_path):
    run_folder.claim(TrainConfig.of(out=tmp_path / "run"))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    run_folder.claim(TrainConfig.of(out=tmp_path / "link", overwrite=True))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"data": 5}', '{"data": [], "steps": "five"}']
)
def test_a_damaged_run_is_named(tmp_path, content):
    (tmp_path / run_folder.RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged: "):
        run_folder.load(tmp_path)


def test_a_run_of_another_version_is_named(tmp_path):
    run_folder.claim(TrainConfig.of(out=tmp_path))
    path = tmp_path / run_folder.RUN_FILE
    path.write_text(path.read_text().replace('"seed"', '"sede"'))
    with pytest.raises(ValueError, match="of another version: it has sede"):
        run_folder.load(tmp_path)


def test_resume_takes_the_flags_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run_folder.claim(TrainConfig.of(autotune=True, softcap=5.0, steps=8))
    for arguments in (["--resume"], ["--resume", "--out", str(out), "--autotune"]):
        resumed = parse([*arguments, "--keep", "9"])
        assert resumed == TrainConfig.of(
            autotune=True, softcap=5.0, steps=8, out=out, resume=True, keep=9
        )


def test_what_a_run_went_on_with_stays_on_record(tmp_path):
    first = TrainConfig.of(out=tmp_path / "run", steps=9)
    run_folder.claim(first)
    second = first.replace(resume=True, learning_rate=1e-4)
    run_folder.claim(second, step=4)
    run_folder.claim(second, step=6)  # as it was: nothing to note
    run_folder.claim(second.replace(clip_norm=0.5, steps=12), step=7)
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["earlier"] == [
        {"until_step": 4, "learning_rate": 3e-3},
        {"until_step": 7, "clip_norm": 1.0, "steps": 9},
    ]
    loaded = run_folder.load(tmp_path / "run")
    assert (loaded.optimizer.learning_rate, loaded.run.steps) == (1e-4, 12)
    with pytest.raises(ValueError, match=r"--label-smoothing was 0\.1 and is 0\.2"):
        run_folder.claim(second.replace(label_smoothing=0.2), step=8)


def test_a_run_s_own_flags_and_not_the_defaults_are_checked_when_it_goes_on(tmp_path):
    data = tmp_path / "gone.jsonl"
    data.touch()
    config = TrainConfig.of(out=tmp_path / "run", steps=300, batch_size=6, data=(data,))
    run_folder.claim(config)
    moved = data.rename(tmp_path / "moved.jsonl")
    again = ["--resume", "--out", str(tmp_path / "run"), "--data", str(moved)]
    resumed = parse([*again, "--mesh", "data=3", "--warmup-steps", "260"])
    assert (resumed.step.mesh, resumed.optimizer.warmup_steps, resumed.data.data) == (
        "data=3",
        260,
        (moved,),
    )
    assert run_folder.claim(parse(again)) == tmp_path / "run"
    assert run_folder.load(tmp_path / "run").data.data == (moved,)
    for other, expected in (("--epochs=2", (None, 2.0)), ("--steps=9", (9, None))):
        resumed = parse([*again, other])
        assert (resumed.run.steps, resumed.run.epochs) == expected


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("bfloat16", ["loss: hopper"]),
        ("float32", ["loss: chunked", "      hopper refuses: needs bfloat16 hidden and head"]),
    ],
)
def test_on_a_gpu_a_run_says_why_its_kernels_stay_idle(dtype, said, monkeypatch, caplog):
    import jax

    from lsce import api
    from train.models.config import PRESETS
    from train.run.prepare import check_loss

    h100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(api, "_device", lambda array: h100)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    caplog.set_level("INFO", "train")
    check_loss(TrainConfig.of(dtype=dtype), dataclasses.replace(PRESETS["tiny"], dtype=dtype))
    assert len(caplog.messages) == len(said)
    for message, start in zip(caplog.messages, said, strict=True):
        assert message.startswith(start)


def test_a_number_for_a_filter_is_the_same_however_it_is_written():
    one, other = (TrainConfig.of(gradient_filter=text) for text in ("1e-4", "0.0001"))
    assert one == other
    assert one.loss.left_out == 1e-4


def test_auto_changes_nothing_of_a_run_that_goes_on():
    earlier = TrainConfig.of(dtype="bfloat16")
    assert TrainConfig.of(dtype="auto").changed_since(earlier) == {}
    assert "dtype" in TrainConfig.of(dtype="float32").changed_since(earlier)
