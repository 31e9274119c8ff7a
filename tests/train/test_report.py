"""The report of runs and results: what is read, what is said, and a page that stands alone."""

import dataclasses
import json
import re

import numpy as np
import pytest

from train import report
from train.config import TrainConfig
from train.evaluation import page, page_drawings, page_entries, results
from train.evaluation.results import Bin, Curve, Measure, Scored, TaskResult


def bins(accuracy=0.5, confidence=0.9, n=200):
    found = [Bin(b / 15, (b + 1) / 15, 0, 0.0, 0.0) for b in range(15)]
    found[13] = Bin(13 / 15, 14 / 15, n, confidence, accuracy)
    return found


def run(folder, *, beta, seed=0, accuracy=0.5, done=True, **settings):
    """A run's files, as far as a report reads them."""
    folder.mkdir(parents=True)
    config = TrainConfig.of(label_smoothing=beta, seed=seed, **settings).flags()
    config |= {"data": [], "eval_data": [], "out": str(folder)}
    (folder / "run.json").write_text(json.dumps(config, default=str))
    rows = [{"step": s, "loss": 5 / s, "grad_norm": 1 / s} for s in range(1, 601)]
    rows.append({"step": 600, "held_out_token_nll": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"st')
    scores = {"n": 200, "nll": 1.5, "accuracy": accuracy, "ece": 0.4, "rms": 0.41, "brier": 0.7}
    scores |= {"mean_confidence": 0.9, "bins": [vars(b) for b in bins(accuracy)]}
    evaluation = {"tokens": scores, "choices": {"reported": "sum", "chance": None, "sum": None}}
    evaluation |= {"config": config, "versions": {"jax": "0.11.2"}, "device": "cpu"}
    if done:
        (folder / "eval.json").write_text(json.dumps(evaluation, default=str))
    return folder


def result(path, model="some/model", against=None):
    """What train.evaluate would write, one made by hand."""
    measures = {"accuracy": Measure(0.5, 0.4, 0.6), "ece": Measure(0.2, 0.1, 0.3)}
    measures |= {"rms": Measure(0.21, 0.1, 0.3), "auroc": Measure(None)}
    scored = Scored(200, measures, bins(), Curve([0.5, 1.0], [0.1, 0.5]))
    task = TaskResult(
        **{"task": "arc-easy", "data": "d", "data_sha256": "0", "questions": 200},
        **{"available": 200, "left_out": 0, "prompt": "harness", "answer": "text", "shots": 0},
        **{"chance": 0.25, "reported": "sum", "scorings": {"sum": scored}, "items": "i.jsonl"},
        against=against,
    )
    results.write(
        path,
        results.Result(
            **{"model": model, "weights": "0", "command": "python -m train.evaluate <&>"},
            **{"seed": 0, "versions": {"jax": "0.11.2"}, "device": "cpu"},
            tasks={"arc-easy": task},
        ),
    )
    return path


def test_runs_and_results_make_one_page_that_stands_alone(tmp_path, capsys):
    runs = [run(tmp_path / f"run{b}", beta=b, accuracy=0.5 + b) for b in (0.0, 0.1)]
    failed = run(tmp_path / "killed", beta=0.3, done=False)
    measured = result(tmp_path / "result.json")
    out = tmp_path / "page" / "report.html"
    given = [*runs, failed, measured, "--out", out, "--title", "A <b> & c"]
    assert report.main([str(x) for x in given]) == 0
    assert "killed (not finished: 600 steps done)" in capsys.readouterr().err
    html, markdown = out.read_text(), out.with_suffix(".md").read_text()
    assert len(html) < 2e6
    assert not re.search(r"(src|href)=\"(?!#)|url\((?!#)|@import|<script", html)  # no other file
    assert "A &lt;b&gt; &amp; c" in html
    assert "train.evaluate &lt;&amp;&gt;" in html
    assert "prefers-color-scheme: dark" in html
    assert "#010203" not in html
    assert html.count("<svg") == 3 + 2 + 2  # diagrams; risk and β; loss and norm
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert used
    assert all(html.count(f'id="{name}"') == 1 for name in used)  # each drawing has its own
    for text in (html, markdown):
        assert "killed" in text
        assert "0.2000" in text
        assert "[0.1000, 0.3000]" in text
        assert "the likeliest choice is the answer" in text
        assert "ECE is lower with β 0.1 than without smoothing" in text
    row = next(line for line in markdown.splitlines() if line.startswith("| run0.1"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "0.1"
    assert cells[2].startswith("**60.0%** [53.")
    header, rule = markdown.splitlines()[2:4]
    assert header.count("|") == rule.count("|") == row.count("|")


def test_a_sweep_beside_other_runs_is_told_apart_by_what_it_varied(tmp_path):
    """Of two settings, one is the sweep's own, and the other that of a run of another kind."""
    for rate in (0.001, 0.003):
        for beta in (0.0, 0.1):
            name = f"label_smoothing={beta},learning_rate={rate}"
            run(tmp_path / name, beta=beta, learning_rate=rate)
    run(tmp_path / "alone", beta=0.1, learning_rate=2e-5, model="nano", dropout=0.0)
    found, _ = page_entries.read([*tmp_path.iterdir()])
    made = page.render(found, [], "t")
    (picture,) = re.findall(r"ECE against β</figcaption>(.*?)</figure>", made["html"], re.DOTALL)
    legend = set(re.findall(r">(learning rate [^<]+)<", picture))
    assert legend == {"learning rate 0.001", "learning rate 0.003"}  # to the last digit
    assert "nano" not in picture
    for rate in (0.001, 0.003):
        assert f"β 0.1, learning rate {rate}: ECE is" in made["md"]
    assert "\n\n## What they say\n\n" in made["md"]
    assert made["md"].splitlines()[2].startswith("| name | β | model |")


def test_a_legend_stays_inside_its_picture():
    """matplotlib gives up, with a warning, where a line of it is wider than the picture."""
    names = [", ".join(f"setting{k} value{k}" for k in range(9)), "a=0.0001,b=2" * 9]
    svg = page_drawings.lines({name: [(0, 1), (1, 2)] for name in names}, "x", "y")
    said = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert any("setting8 value8" in line for line in said)
    assert max(map(len, said)) <= page_drawings.LEGEND_WIDTH


def test_seeds_are_one_row_with_their_range(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.7)):
        run(tmp_path / f"s{seed}", beta=0.1, seed=seed, accuracy=accuracy)
    found, _ = page_entries.read([tmp_path / f"s{seed}" for seed in range(3)])
    (group,) = page.groups(found)
    assert group.name == "s0 and 2 other seeds"
    m = group.measure("held-out tokens", "accuracy")
    assert m is not None
    assert dataclasses.astuple(m) == pytest.approx((0.6, 0.5, 0.7))
    assert "several seeds, the least and the greatest" in page.render(found, [], "t")["md"]


def test_a_name_that_a_sweep_made_is_in_words_without_the_seed_of_one_among_several(tmp_path):
    names = [f"learning_rate=0.003,label_smoothing=0.1,seed={seed}" for seed in (0, 1)]
    for seed, name in enumerate(names):
        run(tmp_path / name, beta=0.1, seed=seed, learning_rate=3e-3)
    run(tmp_path / "mine=1", beta=0.2)
    found, _ = page_entries.read([*(tmp_path / name for name in names), tmp_path / "mine=1"])
    assert found[0].name == "learning rate 0.003, β 0.1, seed 0"
    assert [group.name for group in page.groups(found)] == [
        "learning rate 0.003, β 0.1, 2 seeds",
        "mine=1",
    ]


def test_a_sweep_lists_what_failed(tmp_path):
    run(tmp_path / "label_smoothing=0", beta=0.0)
    jobs = [
        {"name": "label_smoothing=0", "status": "done"},
        {"name": "label_smoothing=0.1", "status": "failed"},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "runs": jobs}))
    found, unfinished = page_entries.read([tmp_path])
    assert [e.name for e in found] == ["β 0"]
    assert unfinished == [page_entries.Unfinished("label_smoothing=0.1", "failed")]
    assert len(found[0].curves["loss"]) == page_entries.MOST_POINTS
    assert found[0].curves["loss"][-1][0] == 600


def test_paired_differences_are_said_with_their_luck(tmp_path):
    apart = {"sum": {"accuracy": Measure(0.1, 0.05, 0.15), "ece": Measure(-0.01, -0.04, 0.02)}}
    against = results.Against("base", "base.json", 200, apart)
    found, _ = page_entries.read([result(tmp_path / "result.json", against=against)])
    said = page.render(found, [], "t")["md"]
    assert "model less base on the same 200 questions, accuracy +0.1000" in said
    assert "[+0.0500, +0.1500]: more than chance" in said
    assert "ECE -0.0100 [-0.0400, +0.0200]: chance may explain it" in said


def test_differences_of_several_seeds_are_one_sentence(tmp_path):
    """Their own intervals decide, and what unpaired ones would say is not said besides."""
    found = []
    for seed, (low, high) in enumerate(((-0.05, -0.01), (-0.04, 0.02), (-0.06, -0.02))):
        ece = Measure((low + high) / 2, low, high)
        against = results.Against(
            "runs/label_smoothing=0,seed=1", "r.json", 200, {"sum": {"ece": ece}}
        )
        name = f"runs/label_smoothing=0.1,seed={seed}"
        path = result(tmp_path / f"{seed}.json", model=name, against=against)
        flags = {"label_smoothing": 0.1, "seed": seed}
        results.write(path, dataclasses.replace(results.read(path), flags=flags))
        found.append(path)
    plain = result(tmp_path / "plain.json", model="runs/label_smoothing=0,seed=0")
    flags = {"label_smoothing": 0.0, "seed": 0}
    results.write(plain, dataclasses.replace(results.read(plain), flags=flags))
    said = page.render(*page_entries.read([plain, *found]), "t")["md"]
    assert (
        "β 0.1, 3 seeds less β 0, seed by seed on the same 200 questions, ECE -0.0267 on average,"
        " from -0.0400 to -0.0100: more than chance with 2 of 3 seeds."
    ) in said
    assert "than without smoothing" not in said


def test_nothing_is_said_of_smoothing_where_no_run_is_without(tmp_path):
    paths = [run(tmp_path / f"run{beta}", beta=beta) for beta in (0.1, 0.2)]
    assert "without smoothing" not in page.render(*page_entries.read(paths), "t")["md"]
    paths.append(run(tmp_path / "plain", beta=0.0, accuracy=0.7))
    said = page.render(*page_entries.read(paths), "t")["md"]
    assert said.count("than without smoothing, 0.4000 and not 0.2000") == 2
    paths += [run(tmp_path / f"{b}", beta=b, seed=1, accuracy=0.7 - b) for b in (0.0, 0.1)]
    said = page.render(*page_entries.read(paths), "t")["md"]
    assert "the ranges over their 2 seeds do not overlap" in said


def test_what_is_not_said_is_counted(monkeypatch):
    monkeypatch.setattr(page, "MOST_SENTENCES", 3)
    assert page._few(["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
    assert page._few(["a", "b", "c", "d", "e"]) == ["a", "b", "c", "2 more are left out here."]


def test_the_interval_of_binned_ece_covers_what_sampling_gives():
    r = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        right = r.binomial(200, 0.7)
        m = page_entries.ece_from_bins(bins(right / 200, 0.9), resamples=300)
        assert m.value == pytest.approx(abs(right / 200 - 0.9))
        covered += m.low <= 0.2 <= m.high
    assert covered >= 51
    few, many = (page_entries.ece_from_bins(bins(0.7, n=n), 300) for n in (100, 10_000))
    assert many.high - many.low < 0.2 * (few.high - few.low)
    assert page_entries.ece_from_bins(bins(n=0)).value is None


def test_a_run_and_its_evaluation_are_one_row_and_no_two_seeds(tmp_path):
    """Its tokens and those of --tokens are different ones; a second result is of the same seed."""
    folder = run(tmp_path / "run", beta=0.1)
    settings = json.loads((folder / "eval.json").read_text())["config"]
    written = results.read(result(tmp_path / "a.json", model=str(folder)))
    tokens = written.tasks["arc-easy"].scorings["sum"]
    written = dataclasses.replace(
        written, flags=settings, label_smoothing=0.1, tokens=tokens, tokens_data="d/recs.jsonl"
    )
    for name in ("a", "b"):
        results.write(tmp_path / f"{name}.json", written)
    found, _ = page_entries.read([folder, tmp_path / "a.json"])
    assert [entry.name for entry in found] == ["run"]
    assert {"held-out tokens", "tokens of recs.jsonl"} < {*found[0].blocks}
    found, _ = page_entries.read([folder, tmp_path / "a.json", tmp_path / "b.json"])
    assert [group.name for group in page.groups(found)] == ["run", "run (2)"]


def test_words_in_a_drawing_keep_their_digits_and_many_names_stand_below_it():
    points = [(0.0, 0.123456), (1.0, 0.2)]
    few, many = (
        page_drawings.lines({f"rate 0.00{n}": points for n in range(1, count)}, "step", "loss")
        for count in (3, 9)
    )
    assert ">rate 0.001</text>" in few
    assert not re.search(r'd="[^"]*\.\d{3}', few)
    assert ">rate 0.008</text>" in many
    height = [float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1]) for svg in (few, many)]
    assert height[1] > 1.3 * height[0]


def test_different_questions_are_said_to_be(tmp_path):
    paths = [result(tmp_path / f"{name}.json", model=name) for name in ("a", "b")]
    assert (
        "not all models were asked" not in page.render(page_entries.read(paths)[0], [], "t")["md"]
    )
    other = results.read(paths[1])
    other.tasks["arc-easy"] = dataclasses.replace(other.tasks["arc-easy"], data_sha256="1")
    results.write(paths[1], other)
    said = page.render(page_entries.read(paths)[0], [], "t")["md"]
    assert "At arc-easy, 0-shot, harness text (sum) not all models were asked the same" in said


def broken(folder, name, content):
    (run(folder, beta=0.0) / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: broken(p / "r", "eval.json", "{"), "eval.json is damaged: "),
        (lambda p: broken(p / "r", "eval.json", "{}"), "eval.json is damaged or of another"),
        (lambda p: broken(p / "r", "sweep.json", "{}"), "sweep.json is damaged or of another"),
        (lambda p: p / "nowhere", "there is no "),
        (lambda p: p, "is neither a run"),
        (lambda p: run(p / "r", beta=0.0, done=False), "none of these is finished"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, make, message):
    given = make(tmp_path)
    assert report.main([str(given), "--out", str(tmp_path / "page.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
