"""Every command of every experiment is one that the trainer takes; the smallest is run."""

import importlib
import json

import pytest
from paths import ROOT

from benchmarks.paper import curves, table1
from train import command_line, evaluate, report, sweep
from train.__main__ import parse as parse_train

NAMES = ("table1", "betas", "sizes", "softcap", "curves")
QUESTIONS = {"nll": 1.0, "ece": 0.1}


@pytest.fixture
def folder(tmp_path):
    """The published files, as far as a plan reads them."""
    alpaca = tmp_path / "shared" / "alpaca"
    alpaca.mkdir(parents=True)
    record = {"instruction": "Say it.", "input": "", "output": "It.", "subsets": ["random_9k"]}
    records = [record, record | {"output": " "}, record | {"subsets": ["fork_5000"]}]
    (alpaca / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return alpaca.parent


def finish(command):
    """Writes what the commands of a sweep or a run would leave, with an NLL for each run."""
    flags = command[3:]
    out = ROOT.__class__(flags[flags.index("--out") + 1])
    if command[2] == "train.sweep":
        jobs = sweep.grid([*flags[: flags.index("--out")], "--out", str(out)])
        runs = [(job.name, out / job.name, job.config.flags()) for job in jobs]
    elif command[2] == "train":
        runs = [(out.name, out, parse_train(flags).flags())]
    else:
        return
    for _, path, config in runs:
        path.mkdir(parents=True)
        (path / "run.json").write_text(json.dumps(config, default=str))
        nll = abs(config["learning_rate"] - 5e-5 * (1 + 3 * (config["label_smoothing"] > 0)))
        (path / "eval.json").write_text(json.dumps({"tokens": {"nll": nll}}))
        rows = [{"step": s, "loss": 2.0 + 0.1 * len(path.name) * (s == 7)} for s in range(1, 9)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if command[2] == "train.sweep":
        listed = [{"name": name, "status": "done"} for name, _, _ in runs]
        (out / "sweep.json").write_text(json.dumps({"runs": listed}))


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_the_trainer_takes(name, folder, tmp_path, monkeypatch):
    experiment = importlib.import_module(f"benchmarks.paper.{name}").EXPERIMENT
    given = ["--data-folder", str(folder), "--out", str(tmp_path / "out"), "--seeds", "0", "1"]
    options = experiment.parse([*given, "--model", "nano"])  # whose files need not be there
    steps = []
    for step in experiment.plan(options):
        steps.append(step)
        assert not step.done(), step.name
        module, flags = step.command[2], list(step.command[3:])
        match module:
            case "train.evaluate":
                command_line.read(evaluate.EvaluateOptions, "it", flags)
            case "train.report":
                command_line.read(report.ReportOptions, "it", flags)
            case _:
                finish(step.command)
                assert step.done(), step.name
    assert steps[-1].command[2] == "train.report"
    data = (tmp_path / "out" / "data" / "alpaca.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"] for line in data] == ["It."]


def test_each_smoothing_has_its_own_learning_rate_and_further_seeds(folder, tmp_path):
    out = tmp_path / "out"
    options = table1.EXPERIMENT.parse(
        ["--data-folder", str(folder), "--out", str(out), "--model", "nano", "--tasks", "arc-easy"]
    )
    steps = []
    for step in table1.plan(options):
        steps.append(step)
        finish(step.command)
    assert table1.chosen(out / "choice") == {
        0.0: "learning_rate=5e-05,label_smoothing=0",
        0.1: "learning_rate=0.0002,label_smoothing=0.1",
    }
    seeds = [step for step in steps if step.command[2] == "train"]
    assert [(s.command[s.command.index("--seed") + 1]) for s in seeds] == ["1", "2", "1", "2"]
    evaluated = [s.command[4] for s in steps if s.command[2] == "train.evaluate"]
    assert len(evaluated) == 1 + 2 * 3
    assert evaluated[0] == "nano"


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
    given = ["--tiny", "--out", str(out), "--implementation", "chunked", "reference"]
    assert curves.EXPERIMENT.main(given) == 0, capfd.readouterr().err[-2000:]
    (row,) = json.loads((out / "curves.json").read_text())
    assert row["steps"] == 2
    assert row["largest"] < 1e-5  # one loss, in two orders of summation
    page = (out / "report.md").read_text()
    assert "implementation" in page
    assert page.startswith("# Made-up records")  # and not a model that is not there
    capfd.readouterr()
    assert curves.EXPERIMENT.main(given) == 0
    assert "done already: every implementation" in capfd.readouterr().out
