"""Every command of every experiment is one that the trainer takes; the smallest is run."""

import dataclasses
import importlib
import json
import pathlib
import shutil

import pytest
from paths import ROOT

from benchmarks.paper import betas, curves, everything, sizes, softcap, steps, table1
from train import command_line, evaluate, report
from train.__main__ import parse as parse_train

NAMES = ("table1", "betas", "sizes", "softcap", "curves")


@pytest.fixture
def folder(tmp_path):
    """The published files, as far as a plan reads them."""
    alpaca = tmp_path / "shared" / "alpaca"
    alpaca.mkdir(parents=True)
    record = {"instruction": "Say it.", "input": "", "output": "It.", "subsets": ["random_9k"]}
    records = [record, record | {"output": " "}, record | {"subsets": ["fork_5000"]}]
    (alpaca / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (alpaca.parent / "dolly").mkdir()
    asked = {"instruction": "Say it.", "context": "", "response": "It.", "category": "open_qa"}
    (alpaca.parent / "dolly" / "d.jsonl").write_text(json.dumps(asked) + "\n")
    for name in ("mmlu/dev", "mmlu/test", "mmlu/val", "arc/Easy-test", "arc/Easy-validation"):
        path = alpaca.parent / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (alpaca.parent / "hellaswag").mkdir()
    (alpaca.parent / "hellaswag" / "val.jsonl").touch()
    return alpaca.parent


def finish(step):
    """Writes what a run or an evaluation would leave, with an NLL for each run."""
    flags = list(step.flags)
    out = pathlib.Path(flags[flags.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    if step.module == "train.evaluate":
        asked = command_line.read(evaluate.EvaluateOptions, "it", flags)
        before = json.loads((out / "result.json").read_text()) if any(out.iterdir()) else {}
        tasks = {**before.get("tasks", {}), **{task: {} for task in asked.task}}
        found = {"tasks": tasks, "settings": {"limit": asked.limit}}
        (out / "result.json").write_text(json.dumps(found))
    elif step.module == "train.report":
        command_line.read(report.ReportOptions, "it", flags)
    else:
        config = parse_train([flag for flag in flags if flag != "--resume"]).flags()
        (out / "checkpoints" / "5").mkdir(parents=True)
        (out / "run.json").write_text(json.dumps(config, default=str))
        nll = abs(config["learning_rate"] - 5e-5 * (1 + 3 * (config["label_smoothing"] > 0)))
        (out / "eval.json").write_text(json.dumps({"tokens": {"nll": nll}}))
        rows = [{"step": s, "loss": 2.0 + 0.1 * len(out.name) * (s == 7)} for s in range(1, 9)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert step.done(), step.name


def worked_off(experiment, options):
    """The steps of a plan that were not done already, each finished when it comes."""
    found = []
    steps.prepare(options)
    for step in experiment.plan(options):
        if not step.done():
            finish(step)
            found.append(step)
    return found


def parsed(experiment, folder, *given):
    """With a model whose files need not be there."""
    out = folder.parent / "out"
    model = [] if experiment is sizes.EXPERIMENT else ["--model", "m"]
    given = [*model, "--data-folder", str(folder), "--out", str(out), *given]
    return experiment.parse(given)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_the_trainer_takes(name, folder):
    experiment = importlib.import_module(f"benchmarks.paper.{name}").EXPERIMENT
    options = parsed(experiment, folder, "--seeds", "0", "1")
    made = worked_off(experiment, options)
    assert made[-1].module == "train.report"
    data = (options.out / "data" / "alpaca.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"] for line in data] == ["It."]
    assert not list(options.out.glob("runs/*/*/checkpoints"))  # gigabytes, once they are evaluated
    assert {s.module for s in worked_off(experiment, options)} <= {"train.report"}


def test_each_arm_has_its_own_learning_rate_and_further_seeds(folder):
    penalised = ("--penalties", "maxsup")
    options = parsed(table1.EXPERIMENT, folder, "--tasks", "arc-easy", *penalised)
    made = worked_off(table1.EXPERIMENT, options)
    trained = [s.name.removeprefix("train m-alpaca/") for s in made if "train " in s.name]
    assert len(trained) == 3 * (4 + 2)
    assert trained[-6:] == [
        f"learning_rate={rate},{arm},seed={seed}"
        for seed in (1, 2)
        for rate, arm in (
            ("5e-05", "label_smoothing=0"),
            ("0.0002", "label_smoothing=0.1"),
            ("0.0002", "implementation=maxsup,label_smoothing=0.1"),
        )
    ]
    assert {s.module for s in made if "maxsup" in s.name and "train " in s.name} == {
        "benchmarks.paper.penalties.__main__"
    }
    evaluated = [s.flags[1] for s in made if s.module == "train.evaluate"]
    assert len(evaluated) == 1 + 3 * 3
    assert evaluated[0] == "m"


def test_what_two_experiments_need_is_made_once(folder):
    worked_off(table1.EXPERIMENT, parsed(table1.EXPERIMENT, folder))
    made = worked_off(betas.EXPERIMENT, parsed(betas.EXPERIMENT, folder, "--learning-rate", "5e-5"))
    named = [s.name for s in made if "train " in s.name]
    assert len(named) == 6 * 3 - 3  # all of β = 0; β = 0.1 was tried, and its weights are gone
    assert [name[-1] for name in named] == 5 * ["0"] + 5 * ["1"] + 5 * ["2"]  # a seed at a time


@pytest.mark.slow
def test_everything_is_the_experiments_one_after_the_other(folder):
    """β is swept at the rate that Table 1 chose, and what others do has the vocabulary's room."""
    made = worked_off(everything.EXPERIMENT, parsed(everything.EXPERIMENT, folder))
    named = [s.name for s in made if "train " in s.name]
    assert named[0].startswith("train m-alpaca/")
    assert named[12].startswith("train m-dolly/")
    swept = [name for name in named if "label_smoothing=0.5" in name]
    assert len(swept) == 3
    assert all("learning_rate=0.0002" in name for name in swept)
    sizes = {
        s.flags[s.flags.index("--batch-size") + 1]
        for s in made
        if "maxsup" in s.name and "train " in s.name
    }
    assert sizes == {"8"}
    capped = [name for name in named if "softcap=" in name]
    assert len(capped) == 4
    assert all(name.endswith("seed=0") for name in capped)
    alone = parsed(table1.EXPERIMENT, folder, "--data", "dolly")
    assert not [s for s in worked_off(table1.EXPERIMENT, alone) if "train " in s.name]


def test_a_folder_goes_on_elsewhere_without_weights(folder):
    """What was trained and not yet evaluated is trained again, and nothing else."""
    options = parsed(betas.EXPERIMENT, folder, "--seeds", "0", "--label-smoothing", "0", "0.1")
    made = []
    steps.prepare(options)
    for step in betas.plan(options):
        finish(step)
        made.append(step)
        if len(made) == 5:  # the second run, and one of its two evaluations
            break
    there = options.out.with_name("there")
    shutil.copytree(options.out, there, ignore=shutil.ignore_patterns("checkpoints", "model"))
    again = worked_off(betas.EXPERIMENT, dataclasses.replace(options, out=there))
    assert [s.name for s in again] == [
        "train m-alpaca/learning_rate=2e-05,label_smoothing=0.1,seed=0",
        "evaluate m-alpaca/learning_rate=2e-05,label_smoothing=0.1,seed=0 at mmlu and arc-easy",
        "evaluate m-alpaca/learning_rate=2e-05,label_smoothing=0.1,seed=0 at hellaswag",
        "report",
    ]
    assert "--resume" in again[0].flags
    assert str(options.out) + "/" not in " ".join(again[0].flags)


def test_an_evaluation_of_fewer_questions_is_not_the_whole_one(folder):
    few = parsed(betas.EXPERIMENT, folder, "--seeds", "0", "--limit", "5")
    worked_off(betas.EXPERIMENT, few)
    made = worked_off(betas.EXPERIMENT, dataclasses.replace(few, limit=None))
    assert [s.module for s in made[:4]] == [
        "train.__main__",
        *2 * ["train.evaluate"],
        "train.__main__",
    ]


def test_tasks_that_are_asked_alike_are_one_evaluation(folder):
    """Reading the weights and drawing takes seconds, for which no GPU is lent."""
    shutil.move(folder / "arc", folder.parent)  # which then comes from the hub
    options = parsed(betas.EXPERIMENT, folder, "--resamples", "0", "--limit", "7")
    flags = [" ".join(s.flags) for s in steps.evaluations(options, "m", options.out)]
    mmlu, arc, hellaswag = (
        command_line.read(evaluate.EvaluateOptions, "it", f.split()) for f in flags
    )
    assert (mmlu.task, mmlu.task_data, mmlu.temperature_from) == (("mmlu",), folder, "validation")
    assert (arc.task, arc.task_data, arc.temperature_from) == (("arc-easy",), None, "validation")
    assert (hellaswag.task, hellaswag.task_data) == (("hellaswag",), folder)
    assert hellaswag.temperature_from is None  # it has no questions besides those asked
    assert {(o.resamples, o.limit) for o in (mmlu, arc, hellaswag)} == {(0, 7)}
    shutil.move(folder.parent / "arc", folder)
    assert len(list(steps.evaluations(options, "m", options.out))) == 2


def test_a_folder_is_shared_by_processes_with_a_model_each(folder, monkeypatch, capsys):
    monkeypatch.setattr(steps, "work", lambda *given: print(given[-1]) or 0)
    one, other = (parsed(table1.EXPERIMENT, folder, "--model", name) for name in ("m", "a/n"))
    assert [table1.EXPERIMENT.make(options) for options in (one, other)] == [0, 0]
    assert capsys.readouterr().out.split() == ["m", "n"]  # what each of them locks
    assert one.out == other.out
    assert steps.before(one) != steps.before(other)


def test_an_uncapped_run_is_a_run_like_any_other(folder):
    """So that it is not made again."""
    given = ("--seeds", "0", "--label-smoothing", "0", "--learning-rate", "2e-5")
    worked_off(table1.EXPERIMENT, parsed(table1.EXPERIMENT, folder, *given))
    made = worked_off(softcap.EXPERIMENT, parsed(softcap.EXPERIMENT, folder, *given))
    assert [s.name.partition("m-alpaca/")[2] for s in made if "train " in s.name] == [
        f"softcap={cap},learning_rate=2e-05,label_smoothing=0,seed=0" for cap in (30, 15)
    ]


def test_the_largest_difference_of_two_curves_is_found(tmp_path):
    for name, losses in (("a", [2.0, 1.0, 4.0]), ("b", [2.0, 1.25, 4.1])):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "loss": loss} for s, loss in enumerate(losses, 1)]
        rows.append({"step": 3, "held_out_token_nll": 9.0})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    (row,) = curves.compare({name: tmp_path / name for name in "ab"})
    assert (row["steps"], row["step"]) == (3, 2)
    assert row["largest"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--tasks", "chess"], "--tasks chess: must be of mmlu"),
        (["--data", "nothing.jsonl"], "must be alpaca, dolly or a file"),
        (["--data-folder", "nowhere"], "--data-folder nowhere is no folder"),
        (["--rows", "5"], "--rows must divide 32, not 5"),
        (["--penalties", "mixup"], "--penalties mixup: must be of maxsup, confidence-penalty"),
        (["--penalties", "maxsup", "--label-smoothing", "0"], "which is 0"),
    ],
)
def test_mistakes_are_one_line(given, message, capsys):
    assert table1.EXPERIMENT.main(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_of_an_experiment_in_small(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # much is compiled and little run
    out = tmp_path / "out"
    given = ["--tiny", "--out", str(out), "--ways", "chunked", "reference"]
    assert curves.EXPERIMENT.main(given) == 0, capfd.readouterr().err[-2000:]
    (row,) = json.loads((out / "curves-tiny.json").read_text())
    assert row["steps"] == 2
    assert row["largest"] < 1e-5  # one loss, in two orders of summation
    page = (out / "curves-tiny.md").read_text()
    assert "implementation" in page
    assert page.startswith("# Made-up records")  # and not a model that is not there
    capfd.readouterr()
    assert curves.EXPERIMENT.main(given) == 0
    said = capfd.readouterr().out
    assert said.count("done already: train tiny/implementation=") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "given"),
    [
        (table1, ["--learning-rate", "1e-3"]),
        (sizes, ["--label-smoothing", "0.1"]),
    ],
    ids=lambda x: "" if isinstance(x, list) else x.EXPERIMENT.name,
)
def test_an_experiment_trains_asks_and_shows(experiment, given, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    out = tmp_path / "out"
    made = experiment.EXPERIMENT.main(["--tiny", "--out", str(out), *given])
    assert made == 0, capfd.readouterr().err[-2000:]
    (page,) = out.glob(f"{experiment.EXPERIMENT.name}-*.md")
    assert "tiny-questions" in page.read_text()
    rows = json.loads((out / "steps.json").read_text())
    assert {row["status"] for row in rows} == {"done"}
    assert not list(out.glob("runs/*/*/checkpoints"))  # weights of what is evaluated are let go
