"""What a folder of experiments comes down to, where time was up: all but weights and answers."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.paper import gather, headline
from train.config import TrainConfig
from train.evaluation import asking, measures, results
from train.evaluation.answers import AnswerFile, Answers
from train.evaluation.page_entries import TOKENS, Block, Entry
from train.evaluation.results import Measure

N = 40
ELSEWHERE = "/home/somebody/copy"
"""Where the experiments ran."""


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Two seeds with and without smoothing, evaluated without a bootstrap, and a run cut off."""
    monkeypatch.setattr(measures, "GROUPS", measures.GROUPS[:1])  # the others compile for long
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "runs" / "paper"
    for seed in (0, 1):
        for beta in (0.0, 0.1):
            run(there, beta, seed)
            evaluation(there, beta, seed)
    evaluation(there, None, 0)
    run(there, 0.2, 0, done=False)
    (there / "steps.json").write_text('[{"step": "train it", "status": "exit 1"}]\n')
    return there


def name(beta, seed):
    return f"learning_rate=2e-05,label_smoothing={beta:g},seed={seed}"


def flags(beta, seed, **more):
    out = f"runs/paper/runs/m-alpaca/{name(beta, seed)}"
    found = TrainConfig.of(
        **{"learning_rate": 2e-5} | more, model="m", label_smoothing=beta, seed=seed
    ).flags()
    data = [f"{ELSEWHERE}/runs/paper/data/alpaca.jsonl"]
    return json.loads(json.dumps(found | {"data": data, "out": out}, default=list))


def run(there, beta, seed, done=True, **more):
    folder = there / "runs" / "m-alpaca" / name(beta, seed)
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "checkpoints" / "5" / "weights").write_bytes(b"many")
    config = flags(beta, seed, **more)
    (folder / "run.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "grad_norm": 1.0}\n')
    bins = [{"low": b / 15, "high": (b + 1) / 15, "count": 0} for b in range(15)]
    bins = [b | {"confidence": 0.0, "accuracy": 0.0} for b in bins]
    scores = {"n": 9, "nll": 2.0, "accuracy": 0.3, "ece": 0.1, "rms": 0.1, "brier": 0.7}
    scores |= {"mean_confidence": 0.4, "bins": bins}
    found = {"tokens": scores, "choices": {"reported": "sum", "chance": None, "sum": None}}
    found |= {"config": config, "versions": {"jax": "0.11.2"}, "device": "NVIDIA H200"}
    if done:
        (folder / "eval.json").write_text(json.dumps(found))


def evaluation(there, beta, seed):
    """Of a run's model; at β = None of the model before, which is right as at β = 0."""
    of = "m-alpaca/" + name(beta, seed) if beta is not None else "before/m"
    folder = there / "evaluations" / of
    temperature, flagged = None, {} if beta is None else flags(beta, seed)
    for file, start in (("a.temperature.jsonl", 100), ("a.jsonl", 0)):
        # The smoothed model is right where the other one is, and at five more.
        r = np.random.default_rng(start)
        z = r.normal(size=(N, 4)) * (1 - 3 * (beta or 0))
        z[: N // 2 + (5 if beta else 0), 1] += 9
        answered = AnswerFile(folder / file, {"format": "lsce-answers", "version": 1})
        answered.add(
            {
                start + i: {
                    **{"answer": 1, "subject": "", "log_prob": row.tolist()},
                    **{"tokens": [2] * 4, "characters": [5] * 4},
                }
                for i, row in enumerate(z)
            }
        )
        last = Answers.of(answered.lines)
        temperature = temperature or last
    task = results.TaskResult(
        **{"task": "arc-easy", "data": "arc", "data_sha256": "0", "questions": N},
        **{"available": N, "left_out": 0, "prompt": "harness", "answer": "text", "shots": 0},
        **{"chance": 0.25, "reported": "sum", "items": "a.jsonl"},
        scorings=asking.scored(last, "text", resamples=0, seed=0),
    )
    task = asking.with_temperature(task, last, temperature, "arc (val)", resamples=0, seed=0)
    results.write(
        folder / "result.json",
        results.Result(
            **{"model": f"runs/paper/runs/{of}" if flagged else "m", "weights": of},
            **{"command": "python -m train.evaluate", "seed": 0, "label_smoothing": beta},
            flags=flagged,
            settings={"resamples": 0, "limit": None},
            **{"versions": {"jax": "0.11.2"}, "device": "NVIDIA H200"},
            tasks={"arc-easy": task},
        ),
    )


@pytest.mark.slow
def test_intervals_and_differences_are_made_from_the_answers(found, tmp_path, capsys):
    assert gather.main(["--out", "kept", "--resamples", "50"]) == 0
    kept = tmp_path / "kept"
    plain, smoothed = (
        results.read(kept / "evaluations" / "m-alpaca" / name(beta, 1)) for beta in (0, 0.1)
    )
    before = results.read(found / "evaluations" / "m-alpaca" / name(0.1, 1))
    sums = smoothed.tasks["arc-easy"].scorings["sum"]
    accuracy = sums.measures["accuracy"]
    assert before.tasks["arc-easy"].scorings["sum"].measures["accuracy"].value == accuracy.value
    assert accuracy.low is not None
    assert accuracy.low < accuracy.value < accuracy.high
    assert sums.temperature.measures["nll"].low is not None
    assert smoothed.settings["resamples"] == 50
    assert plain.tasks["arc-easy"].against.model == "m"
    assert plain.tasks["arc-easy"].against.scorings["sum"]["accuracy"].value == 0
    apart = smoothed.tasks["arc-easy"].against
    assert apart.model.endswith(name(0, 1))  # of its own seed
    least = apart.scorings["sum"]["accuracy"]
    other = plain.tasks["arc-easy"].scorings["sum"].measures["accuracy"].value
    assert least.value == pytest.approx(accuracy.value - other, abs=1e-6)
    assert least.low >= 0  # nothing is wrong that was right: paired, the sign is sure
    page = (kept / "m-alpaca.md").read_text()
    assert page.partition("\n")[0].endswith("before and after, with --gradient-filter fp8")
    said = page.partition("## What they say")[2]
    for part in (page, said):  # what says most comes first, and is not what is left out
        assert 0 < part.index("held-out tokens:") < part.index("arc-easy")
    assert "β 0.1, 2 seeds less learning rate 2e-05, β 0, seed by seed on the same 40" in page
    assert f"{name(0.2, 0)}: not finished" in page  # nothing is dropped
    assert "ECE is" not in page  # what pairs say, intervals side by side need not say again

    lines = (kept / "m-alpaca-headline.md").read_text().splitlines()
    (heads,) = (line for line in lines if "T fitted" in line)
    assert heads.split(" | ")[1:] == [
        *("", "m", "learning rate 2e-05, β 0, 2 seeds", "less before", "β 0, T fitted"),
        *("learning rate 2e-05, β 0.1, 2 seeds", "less β 0 |"),
    ]
    of_tokens = [line.split(" | ")[1:] for line in lines if line.startswith("| held-out tokens")]
    assert [cells[0] for cells in of_tokens] == ["accuracy", "NLL"]  # what it measured
    assert all(cells[1:5:2] == ["–", "–"] and "(" in cells[6] for cells in of_tokens)
    (cells,) = (
        line.split(" | ")[2:] for line in lines if "arc-easy" in line and "accuracy" in line
    )
    before, without, same, fitted, with_smoothing, less = cells
    assert same == "0 (0 to 0; 0 of 2)"
    assert before.startswith(without)
    assert without == fitted == f"{other:.1%}"  # of two seeds with the same answers
    assert with_smoothing == f"{accuracy.value:.1%}"
    assert less == f"{least.value:+.4f} ({least.value:+.4f} to {least.value:+.4f}; 2 of 2) |"

    files = [path for path in kept.rglob("*") if path.is_file()]  # small, and of no machine
    assert {path.name for path in files} == {
        *("steps.json", "run.json", "eval.json", "metrics.jsonl", "result.json"),
        *("m-alpaca.html", "m-alpaca.md", "m-alpaca-headline.md"),
    }
    assert not any(ELSEWHERE in path.read_text() for path in files)
    told = json.loads((kept / "runs" / "m-alpaca" / name(0, 0) / "run.json").read_text())
    assert told["data"] == ["runs/paper/data/alpaca.jsonl"]

    # What experiments go on in elsewhere: without answers, what was measured stays.
    assert gather.main(["--found", "kept", "--out", "again", "--resamples", "50"]) == 0
    for path in files:
        if path.suffix != ".html" and path.name != "m-alpaca.md":  # which name the folder
            assert (tmp_path / "again" / path.relative_to(kept)).read_text() == path.read_text()

    # A task by itself: one that came later, without intervals, beside one whose answers are gone.
    at = kept / "evaluations" / "m-alpaca" / name(0.1, 1)
    new = found / "evaluations" / "m-alpaca" / name(0.1, 1)
    later = dataclasses.replace(results.read(new).tasks["arc-easy"], items="b.jsonl", task="b")
    both = {**smoothed.tasks, "b": later}
    results.write(at / "result.json", dataclasses.replace(smoothed, tasks=both))
    for suffix in (".jsonl", ".temperature.jsonl"):
        (at / f"b{suffix}").write_bytes((new / f"a{suffix}").read_bytes())
    assert gather.main(["--found", "kept", "--out", "third", "--resamples", "50"]) == 0
    third = results.read(tmp_path / "third" / "evaluations" / "m-alpaca" / name(0.1, 1)).tasks
    assert third["arc-easy"] == smoothed.tasks["arc-easy"]
    assert third["b"].scorings["sum"].measures["accuracy"] == accuracy

    capsys.readouterr()
    plain_at = found / "evaluations" / "m-alpaca" / name(0, 1)
    (plain_at / "a.jsonl").unlink()
    assert gather.main(["--out", "fourth", "--resamples", "50"]) == 0
    lost = [line for line in capsys.readouterr().out.splitlines() if "for want of" in line]
    # The plain run's intervals, it less the model before, and the smoothed one less it.
    assert sorted(" ".join(line.split(": ")[1].split()[:2]) for line in lost) == [
        *("no difference", "no difference", "no intervals")
    ]
    assert all("at arc-easy" in line for line in lost)


def test_each_experiment_has_a_page_of_its_own(tmp_path, monkeypatch):
    """With Table 1's runs of the same learning rate beside what it has of its own."""
    there, pages = tmp_path / "runs" / "paper", {}
    for seed, beta in enumerate((0, 0.1, 0.3)):
        run(there, beta, seed)
    run(there, 0, 5, softcap=30.0, done=False)
    run(there, 0.1, 6, implementation="maxsup", learning_rate=1.0)
    run(there, 0.1, 7, implementation="chunked", steps=300)
    (there / "steps.json").write_text("[]")
    (there / "curves-m-alpaca.json").write_text("[]")
    (tmp_path / "kept" / "runs" / "m-alpaca" / "notes").mkdir(parents=True)  # which is no run

    def page(given):
        out = given[given.index("--out") + 1]
        pages[out] = [int(path[-1]) for path in given if path.startswith("kept/runs")]
        return 0

    monkeypatch.setattr(gather.report, "main", page)
    monkeypatch.chdir(tmp_path)
    assert gather.main(["--out", "kept"]) == 0
    assert {name.removeprefix("kept/m-alpaca"): sorted(shown) for name, shown in pages.items()} == {
        ".html": [0, 1, 5],  # what is not finished is listed nowhere else
        "-betas.html": [0, 1, 2],
        "-penalties.html": [6],
        "-curves.html": [7],
    }
    assert (tmp_path / "kept" / "curves-m-alpaca.json").is_file()


def test_of_one_seed_there_is_an_interval_and_no_range():
    apart = {"ece": Measure(-0.02, -0.03, -0.01)}
    pair = results.Against("plain", "r.json", N, {"sum": apart}), apart
    block = Block("t", N, 0.25, {}, [], results.Curve([1.0], [0.5]), "0", pair)
    about = {"source": "r", "curves": {}, "versions": {}, "device": "cpu"}
    settings = {"label_smoothing": 0.1}
    entry = Entry(name="it", settings=settings, blocks={"t": block}, **about)
    (line,) = (line for line in headline.table([entry]).splitlines() if "ECE" in line)
    assert line == "| t | ECE | – | -0.0200 [-0.0300, -0.0100] |"
    assert headline.table([dataclasses.replace(entry, blocks={})]) == ""


def test_tokens_are_compared_within_a_model_and_a_softcap():
    def entry(model: str, softcap: float | None, beta: float, nll: float) -> Entry:
        asked = Block("t", N, 0.25, {}, [], results.Curve([1.0], [0.5]), "0", None)
        tokens = Block(TOKENS, N, None, {"nll": Measure(nll)}, [], None, "0", None)
        settings = {"label_smoothing": beta, "model": model, "softcap": softcap, "seed": 0}
        about = {"source": "r", "curves": {}, "versions": {}, "device": "cpu"}
        name = f"{model} {softcap} {beta}"
        return Entry(name=name, settings=settings, blocks={TOKENS: tokens, "t": asked}, **about)

    runs = [
        *(entry("a", None, 0.0, 2.0), entry("a", None, 0.1, 2.1)),
        *(entry("a", 30.0, 0.0, 1.5), entry("a", 30.0, 0.1, 1.7)),
        *(entry("b", None, 0.0, 5.0), entry("b", None, 0.1, 5.4)),
    ]
    (line,) = (
        line for line in headline.table(runs).splitlines() if "NLL" in line and TOKENS in line
    )
    apart = [cell.partition(" (")[0] for cell in line.split(" | ") if " (" in cell]
    assert sorted(apart) == ["+0.1000", "+0.2000", "+0.4000"]


def test_answers_that_are_not_the_results_are_refused(found, capsys):
    folder = found / "evaluations" / "m-alpaca" / name(0, 0)
    lines = (folder / "a.jsonl").read_text().splitlines()
    (folder / "a.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert gather.main(["--out", "kept"]) == 2
    assert "a.jsonl answers 39 questions, and its result 40" in capsys.readouterr().err


def test_a_folder_without_experiments_is_refused(tmp_path, capsys):
    assert gather.main(["--found", str(tmp_path)]) == 2
    assert "holds no experiments: there is no steps.json" in capsys.readouterr().err
