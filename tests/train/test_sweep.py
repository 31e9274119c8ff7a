"""The sweep: its command line, finished, cut off and failing runs, the comparison."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from paths import ROOT
from rich.console import Console

from train import sweep
from train.__main__ import parse
from train.evaluation import comparison
from train.run import folder as run_folder

STAND_IN = '''
"""Claims its folder as `python -m train` does, and "trains" in no time."""
import json, os, signal, sys, time
from pathlib import Path
from train.run import folder as run_folder
from train.__main__ import parse

config = parse(sys.argv[1:])
out = run_folder.claim(config)
with open(out.parent / "calls.txt", "a") as calls:
    print(out.name, "resume" if config.run.resume else "new", file=calls)
if config.loss.label_smoothing == 0.3:
    sys.exit(3)
if config.loss.label_smoothing == 0.4 and not config.run.resume:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (out.parent / "ready").touch()
    signal.pause()
beta = config.loss.label_smoothing
scores = {"n": 100, "nll": 2.0, "accuracy": 0.5 + beta, "ece": 0.2 - beta, "rms": 0.21,
          "brier": 0.7, "mean_confidence": 0.6}
evaluation = {"tokens": scores, "choices": {"reported": "sum", "sum": scores}}
(out / "eval.json").write_text(json.dumps(evaluation))
'''


@pytest.fixture
def checked_here(monkeypatch) -> None:
    """Runs are checked in this process: another takes seconds to start."""
    monkeypatch.setattr(sweep, "check_runs", lambda configs: configs and sweep._check_runs(configs))


@pytest.fixture
def stand_in(checked_here, tmp_path, monkeypatch) -> Path:
    """Replaces the trainer by a script."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return script


def calls(out: Path) -> list[str]:
    return (out / "calls.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "nothing to compare: give a flag several values"),
        ("--steps 5", "nothing to compare"),
        ("--learning-rat 1 2", "there is no flag --learning-rat: did you mean --learning-rate?"),
        ("--nonsense 1 2", "there is no flag --nonsense, see --help"),
        ("--learning-rate fast 1", "--learning-rate must be a number, not 'fast'"),
        ("--learning-rate", "--learning-rate needs a value"),
        ("--label-smoothing 0 2", "--label-smoothing must be in [0, 1], not 2.0"),
        ("--steps 5 10 --epochs 1", "--steps 5 and --epochs 1.0 contradict each other"),
        ("--schedule linear upwards", "--schedule must be one of constant, cosine, linear, not "),
        ("0 0.1", "'0' stands behind no flag"),
        ("--seed 0 --seed 1", "--seed is given twice"),
        ("--label-smoothing 0 0.0", "the same run is asked for twice: label_smoothing=0"),
        ("--out a b --seed 0 1", "--out takes one folder"),
        ("--autotune maybe true", "--autotune takes true and false, not 'maybe'"),
        ("--resume --seed 0 1", "--resume is for single runs"),
        ("--held-out 0 0.1", "--held-out 0 leaves nothing to compare"),
        ("--implementation auto hoper", "implementation='hoper'; must be one of"),
        ("--implementation auto hopper", "hopper"),
        ("--batch-size 7 --mesh data=1 data=7", "--mesh data=7,fsdp=1 has 7 devices, and this "),
    ],
)
def test_a_mistake_is_one_clear_line_before_anything_is_made(
    flags, message, capsys, tmp_path, monkeypatch, checked_here
):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(flags.split()) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_another_process_finds_is_one_line_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["--data", "no.jsonl", "--seed", "0", "1"]) == 2
    assert capsys.readouterr().err == "python -m train.sweep: there is no file no.jsonl\n"
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_where_no_box_can_be_drawn(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert sweep.main(["--label-smoothing", "0", "2"]) == 2
    said = capsys.readouterr().err
    assert said == "python -m train.sweep: --label-smoothing must be in [0, 1], not 2.0\n"


@pytest.mark.parametrize("model", ["nano", "smollm2-135m"])
def test_a_run_of_the_grid_is_what_the_trainer_makes_of_its_flags(model, tmp_path):
    for job in sweep.grid(f"--model {model} --label-smoothing 0 0.1 --out {tmp_path}".split()):
        config = parse([*job.arguments, "--out", str(job.folder)])
        assert job.config.flags() == config.flags()
        run_folder.claim(config.replace(softcap=30.0))  # as a model with one of its own does
        sweep.check_folder(job)


def test_help_lists_the_flags_and_how_to_give_several_values(capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--label-smoothing 0 0.1 --learning-rate 1e-3 3e-3" in said
    for flag in ("--label-smoothing BETA", "--steps N", "--out FOLDER"):
        assert flag in said
    assert "--overwrite" not in said


def test_the_grid_is_every_combination_in_order(tmp_path):
    jobs = sweep.grid(
        f"--label_smoothing=0 --steps 7 --learning-rate 1e-3 3e-3 --out {tmp_path}"
        " --softcap None 30".split()
    )
    assert [job.settings for job in jobs] == [
        {"learning_rate": rate, "softcap": cap} for rate in (1e-3, 3e-3) for cap in (None, 30.0)
    ]
    assert jobs[0].name == "learning_rate=0.001,softcap=off"
    assert jobs[3].folder == tmp_path / "learning_rate=0.003,softcap=30"
    assert all(job.config.run.steps == 7 and job.config.loss.label_smoothing == 0 for job in jobs)
    assert " ".join(jobs[1].arguments) == (
        "--label-smoothing 0 --steps 7 --learning-rate 1e-3 --softcap 30"
    )


def test_switches_and_files_in_a_grid(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.touch()
    off, on = sweep.grid(["--autotune", "false", "true", "--data", *map(str, files)])
    assert (off.config.step.autotune, on.config.step.autotune) == (False, True)
    assert off.config.data.data == on.config.data.data == tuple(files)
    assert off.arguments == ("--data", *map(str, files))
    assert on.arguments == ("--autotune", "--data", *map(str, files))


@pytest.mark.slow
def test_runs_once_then_skips_and_compares(stand_in, tmp_path, capfd):
    out = tmp_path / "sweep"
    command = f"--label-smoothing 0 0.1 --learning-rate 1e-3 3e-3 --steps 5 --out {out}".split()
    assert sweep.main(command) == 0
    names = [
        f"label_smoothing={b},learning_rate={r}"
        for b, r in itertools.product(("0", "0.1"), ("0.001", "0.003"))
    ]
    assert calls(out) == [f"{name} new" for name in names]
    shown = capfd.readouterr().out
    assert "60.0%" in shown  # accuracy with smoothing
    assert "0.1000" in shown  # ECE with smoothing
    found = json.loads((out / "sweep.json").read_text())
    assert [run["name"] for run in found["runs"]] == names
    assert {run["status"] for run in found["runs"]} == {"done"}
    assert found["runs"][2]["settings"] == {"label_smoothing": 0.1, "learning_rate": 0.001}
    assert found["runs"][2]["tokens"]["ece"] == pytest.approx(0.1)
    assert matplotlib.image.imread(out / "sweep.png").shape[1] > 1000

    assert sweep.main([*command, "--log-every", "3"]) == 0
    assert len(calls(out)) == 4
    assert capfd.readouterr().out.count("already done") == 4

    assert sweep.main([*command[:-4], "--steps", "6", "--out", str(out)]) == 2
    assert "holds a run with --steps 5, not 6" in capfd.readouterr().err


def test_a_failing_run_is_named_and_costs_no_other(stand_in, tmp_path, capfd):
    out = tmp_path / "sweep"
    assert sweep.main(f"--label-smoothing 0 0.3 0.1 --out {out}".split()) == 1
    assert len(calls(out)) == 3
    assert "label_smoothing=0.3 failed (exit status 3)" in capfd.readouterr().err
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["done", "failed", "done"]
    assert runs[1]["tokens"] is None


@pytest.mark.slow
def test_a_signal_reaches_the_run_and_the_same_command_goes_on(stand_in, tmp_path):
    out = tmp_path / "sweep"
    flags = f"--label-smoothing 0.4 0.1 --out {out}".split()
    code = f"""
import sys
from train import sweep
sweep.TRAIN = {(sys.executable, str(stand_in))!r}
sys.exit(sweep.main({flags!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        try:
            while not (out / "ready").exists():
                assert process.poll() is None
                os.sched_yield()
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert calls(out) == ["label_smoothing=0.4 new"]
    assert sweep.main(flags) == 0
    assert calls(out)[1:] == ["label_smoothing=0.4 resume", "label_smoothing=0.1 new"]


def result(scores: dict[str, float] | None = None, **settings) -> comparison.Result:
    beta = settings.get("label_smoothing", 0.0)
    tokens = {"n": 100, "accuracy": 0.4 + beta, "ece": 0.2 - beta, "rms": 0.3 - beta} | (
        scores or {}
    )
    choices = {"reported": "per_token", "per_token": tokens, "sum": None}
    return comparison.Result("a run", settings, {"tokens": tokens, "choices": choices})


GRID = [
    result({"ece": 0.2 - beta + seed / 100}, label_smoothing=beta, learning_rate=rate, seed=seed)
    for beta, rate, seed in itertools.product((0.0, 0.1), (1e-3, 1e-2), (0, 1))
]


def test_the_table_has_smoothed_beside_unsmoothed_and_marks_the_best():
    header, rows, best = comparison.table(GRID)
    assert [name for _, name in header] == [
        "β", "learning rate", "seed", *["accuracy", "ECE", "RMS"] * 2,
    ]  # fmt: skip
    assert [row[:3] for row in rows[:3]] == [
        ["0", "0.001", "0"], ["0.1", "0.001", "0"], ["0", "0.001", "1"],
    ]  # fmt: skip
    assert rows[1][3:6] == ["50.0%", "0.1000", "0.2000"]
    ece = next(c for c, column in enumerate(header) if column == ("questions", "ECE"))
    assert {r for r, c in best if c == ece} == {1, 5}  # β = 0.1 and seed 0, at both rates


def test_a_folder_or_a_result_that_is_none_is_named(stand_in, tmp_path, capfd):
    flags = ["--label-smoothing", "0", "0.1", "--out"]
    (tmp_path / "file").touch()
    assert sweep.main([*flags, str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'} is a file: name a folder" in capfd.readouterr().err
    assert sweep.main([*flags, str(tmp_path)]) == 2
    assert f"{tmp_path} is not empty and is not a sweep's" in capfd.readouterr().err
    (tmp_path / "bad.jsonl").write_text("[]")
    bad = ["--data", str(tmp_path / "bad.jsonl")]
    assert sweep.main([*bad, *flags, str(tmp_path / "none")]) == 2
    assert "bad.jsonl holds no records" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()
    damaged = tmp_path / "sweep" / "label_smoothing=0" / "eval.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    assert sweep.main([*flags, str(tmp_path / "sweep")]) == 2
    assert f"{damaged} is damaged" in capfd.readouterr().err
    assert not stand_in.with_name("calls.txt").exists()


def test_the_printed_table_fits_a_terminal():
    text = io.StringIO()
    comparison.print_table(GRID, Console(file=text, width=80))
    assert "…" not in text.getvalue()
    assert text.getvalue().count("50.0%") == 8


def lines(results: list[comparison.Result]) -> dict[str, tuple[list, list]]:
    """The lines of the ECE panel of the questions, by their label."""
    panel = comparison.figure(results).axes[1]
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in panel.lines
    }


def test_the_picture_draws_a_line_for_each_beta_with_seeds_averaged():
    drawn = lines(GRID)
    assert drawn.keys() == {"β = 0", "β = 0.1"}
    rates, ece = drawn["β = 0.1"]
    assert rates == [1e-3, 1e-2]
    assert ece == pytest.approx([0.105, 0.105])


@pytest.mark.parametrize(
    "varied",
    [
        {"label_smoothing": (0.0, 0.1, 0.2, 0.3, 0.5), "schedule": ("linear", "cosine")},
        {"label_smoothing": (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)},
        {"learning_rate": tuple(float(f"{i}e-4") for i in range(1, 11))},
        {"z_loss": (0.0, 1e-5, 1e-4, 1e-3)},
        {"schedule": ("linear", "cosine"), "weight_decay": (0.0, 0.1), "dropout": (0.0, 0.1)},
    ],
)
def test_nothing_in_the_picture_is_cut_off_or_in_the_way(varied):
    results = [
        result(**dict(zip(varied, values, strict=True)))
        for values in itertools.product(*varied.values())
    ]
    drawn = comparison.figure(results)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    width, height = canvas.get_width_height()
    for legend in drawn.legends:
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    for ax in drawn.axes[:4]:
        labels = [label for label in ax.get_xticklabels() if label.get_text()]
        if not labels[0].get_rotation():
            boxes = [label.get_window_extent() for label in labels]
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_runs_with_other_numbers_of_predictions_are_not_passed_off_as_alike():
    results = [result({"n": n}, dropout=n / 1000) for n in (119, 167, 150)]
    titles = [ax.get_title(loc="left") for ax in comparison.figure(results).axes]
    assert "Held-out tokens, n = 119 to 167" in titles


def test_a_chance_difference_in_accuracy_looks_small():
    results = [result({"accuracy": 0.4 + seed / 1000}, seed=seed) for seed in (0, 1)]
    low, high = comparison.figure(results).axes[0].get_ylim()
    assert low < 0.4 < 0.401 < high
    assert high - low >= 0.05


@pytest.mark.parametrize(
    ("varied", "x"),
    [
        ({"label_smoothing": (0.0, 0.1)}, [0.0, 0.1]),
        ({"seed": (0, 1)}, [0, 1]),
        ({"label_smoothing": (0.0, 0.1), "dropout": (0.0, 0.2)}, [0.0, 0.2]),
        ({"schedule": ("linear", "cosine")}, [0, 1]),
        ({"softcap": (None, 30.0)}, [0, 1]),
    ],
)
def test_other_fields_take_the_place_of_the_learning_rate(varied, x):
    results = [
        result(**dict(zip(varied, values, strict=True)))
        for values in itertools.product(*varied.values())
    ]
    assert {tuple(xs) for xs, _ in lines(results).values()} == {tuple(x)}


@pytest.mark.parametrize("groups", [["questions", "tokens"], ["tokens"], []])
def test_only_what_every_run_has_is_compared(groups):
    some, all_ = result(held_out=0.0), result(held_out=0.1)
    if "questions" not in groups:
        some.evaluation["choices"]["per_token"] = None
    if "tokens" not in groups:
        some.evaluation["tokens"] = None
    header, _, _ = comparison.table([all_, some])
    assert [group for group, _ in header] == [""] + [group for group in groups for _ in range(3)]
    assert len(comparison.figure([all_, some]).axes) == 2 * len(groups) + 1


@pytest.mark.slow
def test_two_real_runs(tmp_path):
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for i in range(80):
            print(
                json.dumps({"prompt": f"Count {i}.", "completion": f"{i} and {i + 1}"}), file=file
            )
    flags = f"--label-smoothing 0 0.5 --data {data} --out {tmp_path / 'sweep'} --held-out 0.2"
    flags += " --model nano --vocab-size 270 --max-length 32 --batch-size 2 --steps 2"
    command = [sys.executable, "-m", "train.sweep", *flags.split()]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # to compile, which is most of it
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [run["settings"] for run in runs] == [{"label_smoothing": b} for b in (0.0, 0.5)]
    assert all(0 < run["tokens"]["nll"] < 6 and run["tokens"]["n"] > 20 for run in runs)
    assert runs[0]["tokens"]["nll"] != runs[1]["tokens"]["nll"]
    assert (tmp_path / "sweep" / "label_smoothing=0.5" / "reliability.png").is_file()


def test_runs_that_were_begun_say_what_auto_is(tmp_path):
    jobs = sweep.grid(["--label-smoothing", "0", "0.1", "0.2", "--out", str(tmp_path / "s")])
    assert sweep.in_one_dtype(jobs) == jobs
    run_folder.claim(jobs[1].config.replace(dtype="bfloat16"))
    one = sweep.in_one_dtype(jobs)
    assert {job.config.model.dtype for job in one} == {"bfloat16"}
    assert all(job.arguments[-2:] == ("--dtype", "bfloat16") for job in one)
    run_folder.claim(jobs[2].config.replace(dtype="float32"))
    with pytest.raises(ValueError, match="have --dtype bfloat16 and float32: name one of them"):
        sweep.in_one_dtype(jobs)
