"""A run that was killed and goes on ends as one that was never killed, to the last bit.

The kills are real signals: a run in a process of its own sends them to itself after a given step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from paths import ROOT

from train.__main__ import main
from train.config import TrainConfig
from train.run import folder as run_folder
from train.run import loop
from train.run.folder import CHECKPOINTS
from train.run.prepare import prepare

STEPS, EVERY = 20, 5
pytestmark = pytest.mark.slow

KILLED_RUN = """
import os, signal, sys
from train.run import loop
from train.__main__ import main

class Killer(loop.Monitor):
    "Its step is recorded when the next one has begun already."
    def step(self, step, values):
        super().step(step, values)
        if step == int(sys.argv[2]):
            os.kill(os.getpid(), int(sys.argv[1]))

loop.Monitor = Killer
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # The runs compile the same programs: here, and by this variable in other processes.
        compiled = str(tmp_path_factory.mktemp("compiled"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
        jax.config.update("jax_compilation_cache_dir", compiled)
        yield
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    random = np.random.default_rng(0)
    words = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(words, random.integers(low, high)))

    rows = [{"prompt": text(2, 5), "completion": text(3, 12)} for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(out: Path, records: Path) -> list[str]:
    options = {
        "--data": records, "--out": out, "--model": "nano", "--vocab-size": 300,
        "--max-length": 32, "--batch-size": 2, "--accumulate": 2, "--steps": STEPS,
        "--checkpoint-every": EVERY,
    }  # fmt: skip
    return [str(part) for option in options.items() for part in option]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, records) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert main(flags(out, records)) == 0
    return out


def killed(signum: int, step: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED_RUN, str(int(signum)), str(step), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def rows(out: Path) -> list[dict[str, float]]:
    """What each training step measured, but for the time it took."""
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in written if "loss" in row]
    timed = ("tokens_per_second", "input_wait")
    return [{k: v for k, v in row.items() if k not in timed} for row in steps]


def evaluated(out: Path) -> dict:
    """What eval.json says, which has the flags as run.json has them."""
    found = json.loads((out / "eval.json").read_text())
    noted = json.loads((out / "run.json").read_text())
    noted.pop("earlier", None)
    assert found.pop("config") == noted
    return found


def saved_steps(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / CHECKPOINTS).iterdir())


def final_state(out: Path) -> list[np.ndarray]:
    config = run_folder.load(out)
    run = prepare(config.replace(resume=True))
    assert run.first_step == run.total_steps
    run.checkpointer.__exit__()
    return [np.asarray(leaf) for leaf in jax.tree.leaves((run.state.params, run.state.opt_state))]


def assert_same_run(out: Path, expected: Path) -> None:
    assert [row["step"] for row in rows(expected)] == list(range(1, STEPS + 1))
    assert rows(out) == rows(expected)
    assert evaluated(out) == evaluated(expected)
    for one, other in zip(final_state(out), final_state(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_run_trains(uninterrupted):
    losses = [row["loss"] for row in rows(uninterrupted)]
    assert losses[0] == pytest.approx(np.log(300), abs=0.5)
    assert np.mean(losses[-5:]) < losses[0] - 0.3
    rates = [row["learning_rate"] for row in rows(uninterrupted)]
    assert rates[:3] == pytest.approx([0.0015, 0.003, 0.003 * np.cos(np.pi / 38) ** 2])
    assert saved_steps(uninterrupted) == [15, 20]
    assert (uninterrupted / "eval.json").exists()
    assert (uninterrupted / "reliability.png").exists()


def test_sigkill_then_resume_is_the_uninterrupted_run(tmp_path, uninterrupted, records):
    out = tmp_path / "run"
    assert killed(signal.SIGKILL, 13, flags(out, records)).returncode == -signal.SIGKILL
    assert len(rows(out)) == 13
    assert saved_steps(out) == [5, 10]
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, uninterrupted)


RANDOMLY_KILLED = """
import os, random, signal, sys, threading
from train.__main__ import main
from train.run import loop  # once: each run below is a fork of this process, in which JAX is idle

kills, folder, *arguments = sys.argv[1:]
choose = random.Random(0)
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")

def die_at(moment, delay, out):
    "Kills this process soon after it has changed that many files and folders of the run."
    def count(event, arguments):
        nonlocal moment
        if event in CHANGES and out in str(arguments[0]):
            moment -= 1
            if moment == 0:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    sys.addaudithook(count)

runs, died = 1, 0
while True:
    out = f"{folder}/{runs}"
    begun = os.path.exists(f"{out}/run.json")
    moment, delay = choose.randrange(1, 200), 0.03 * choose.random()
    child = os.fork()
    if not child:
        if died < int(kills):
            die_at(moment, delay, out)
        flags = [out if argument == "OUT" else argument for argument in arguments]
        os._exit(main([*flags, *["--resume"] * begun]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGKILL:
        died += 1
    elif status:
        sys.exit(status)
    elif died == int(kills):
        sys.exit(0)
    else:
        runs += 1
"""


def test_random_kills_lose_no_step(tmp_path, uninterrupted, records):
    """Evaluations, samples and saves of the best are among what is killed, and change nothing.

    LSCE_KILLS=50 kills that often.
    """
    kills = os.environ.get("LSCE_KILLS", "6")
    options = ["--eval-every", "6", "--samples", "1", "--keep", "1"]
    command = [sys.executable, "-c", RANDOMLY_KILLED, kills, str(tmp_path)]
    process = subprocess.run(
        [*command, *flags(Path("OUT"), records), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for out in sorted(tmp_path.iterdir()):
        assert_same_run(out, uninterrupted)
        for file, what in (("metrics.jsonl", "held_out_token_nll"), ("samples.jsonl", "answer")):
            lines = map(json.loads, (out / file).read_text().splitlines())
            assert [row["step"] for row in lines if what in row] == [6, 12, 18, 20]
        scores = {
            row["held_out_token_nll"]: row["step"]
            for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if "held_out_token_nll" in row
        }
        best = json.loads((out / "best.json").read_text())["step"]
        assert best == scores[min(scores)]
        assert saved_steps(out) == sorted({best, 20})
        leftovers = [path for path in out.rglob("*") if "tmp" in path.name]
        assert leftovers == []


def test_sigterm_saves_the_step_and_resume_is_the_uninterrupted_run(
    tmp_path, uninterrupted, records
):
    out = tmp_path / "run"
    process = killed(signal.SIGTERM, 7, flags(out, records))
    assert process.returncode == 143
    assert process.stderr.splitlines()[-1] == (
        "python -m train: SIGTERM: stopped after step 8, which is saved;"
        f" --resume --out {out} goes on from there"
    )
    assert "Traceback" not in process.stderr
    assert saved_steps(out) == [5, 8]
    assert not (out / "eval.json").exists()
    assert main([*flags(out, records), "--resume"]) == 0
    assert_same_run(out, uninterrupted)


def test_sigint_saves_the_step_too(tmp_path, records):
    out = tmp_path / "run"
    process = killed(signal.SIGINT, 2, flags(out, records))
    assert process.returncode == 130
    assert "SIGINT: stopped after step 3, which is saved" in process.stderr
    assert "Traceback" not in process.stderr
    assert saved_steps(out) == [3]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, uninterrupted, records):
    out = tmp_path / "run"
    assert killed(signal.SIGKILL, 3, flags(out, records)).returncode == -signal.SIGKILL
    assert saved_steps(out) == []
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, uninterrupted)


def test_ten_steps_and_ten_more_are_twenty(tmp_path, records):
    config = TrainConfig.of(
        data=(records,), model="nano", vocab_size=300, max_length=32, batch_size=2,
        steps=20, schedule="constant", warmup_steps=4, held_out=0,
    )  # fmt: skip
    once, twice = tmp_path / "once", tmp_path / "twice"
    loop.run(config.replace(out=once))
    loop.run(config.replace(out=twice, steps=10))
    assert len(rows(twice)) == 10
    loop.run(config.replace(out=twice, resume=True))
    assert_same_run(twice, once)
    with pytest.raises(ValueError, match="at step 20 already, past all 10 steps"):
        loop.run(config.replace(out=twice, steps=10, resume=True))


def test_resuming_with_other_flags_is_refused_and_names_them(uninterrupted, records, capsys):
    before = sorted((uninterrupted / CHECKPOINTS).rglob("*"))
    other = ["--label-smoothing", "0.3", "--seed", "7", "--keep", "9", "--learning-rate", "1"]
    assert main([*flags(uninterrupted, records), "--resume", *other]) == 2
    message = capsys.readouterr().err
    assert "--label-smoothing was 0.1 and is 0.3; --seed was 0 and is 7" in message
    assert "--keep" not in message
    assert "--learning-rate" not in message
    assert sorted((uninterrupted / CHECKPOINTS).rglob("*")) == before


def test_resuming_on_other_data_is_refused(tmp_path, uninterrupted, records, capsys):
    changed = tmp_path / "records.jsonl"
    changed.write_text(records.read_text().replace("ant", "ape"))
    arguments = ["--resume", "--out", str(uninterrupted), "--data", str(changed)]
    assert main(arguments) == 2
    assert "belongs to other data" in capsys.readouterr().err


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_that_cannot_start_changes_no_run_before_it(tmp_path, uninterrupted, records, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(records.read_text() + "{\n")
    other = tmp_path / "other.jsonl"  # its tokenizer has another size
    other.write_text(records.read_text().replace("ant", "a"))
    before = everything(uninterrupted)
    on = ["--out", str(uninterrupted)]
    for arguments, message in (
        ([*flags(uninterrupted, bad), "--overwrite"], "bad.jsonl:61: invalid JSON"),
        (["--resume", *on, "--data", str(bad)], "bad.jsonl:61: invalid JSON"),
        (["--resume", *on, "--data", str(other)], "belongs to other data"),
        (["--resume", *on, "--data", "gone.jsonl"], "gone.jsonl is gone: say with --data where"),
        (["--resume", *on, "--eval-data", "gone"], "gone is gone: say with --eval-data where it"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
        assert everything(uninterrupted) == before
    assert main(flags(tmp_path / "new", bad)) == 2
    assert not (tmp_path / "new").exists()


def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(tmp_path, records):
    out = tmp_path / "run"
    config = TrainConfig.of(
        data=(records,), model="nano", vocab_size=300, max_length=32, batch_size=2,
        steps=4, schedule="constant", warmup_steps=1, eval_every=2, out=out,
    )  # fmt: skip
    loop.run(config.replace(steps=2))

    def held_out() -> list[dict[str, float]]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [row for line in lines if "held_out_token_nll" in (row := json.loads(line))]

    [first] = held_out()
    trained = [line for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    (out / "metrics.jsonl").write_text("\n".join(trained) + "\n")
    loop.run(config.replace(resume=True))
    assert held_out()[0] == first
    assert [row["step"] for row in held_out()] == [2, 4]


@pytest.mark.parametrize(("decay", "step", "saved"), [("0", 2, [1]), ("99", 1, [])])
def test_a_nan_stops_the_run_and_is_never_saved(tmp_path, records, capsys, decay, step, saved):
    out = tmp_path / "run"
    absurd = ["--learning-rate", "3e38", "--warmup-steps", "0", "--weight-decay", decay]
    assert main([*flags(out, records), *absurd, "--checkpoint-every", "1"]) == 1
    message = capsys.readouterr().err
    assert f"step {step}: loss" in message
    assert ("checkpoint of step 1 is kept" in message) == (saved == [1])
    assert saved_steps(out) == saved
    if saved:
        run = prepare(run_folder.load(out).replace(resume=True))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state.params))
        run.checkpointer.__exit__()


def test_the_advice_after_a_nan_can_be_followed(tmp_path, records, capsys):
    out = tmp_path / "run"
    assert main([*flags(out, records), "--steps", "5"]) == 0
    again = ["--resume", "--out", str(out)]
    assert main([*again, "--steps", "8", "--learning-rate", "3e38"]) == 1
    message = capsys.readouterr().err
    assert (
        f"To go on from step 5, give --resume --out {out} with a lower --learning-rate" in message
    )
    assert saved_steps(out) == [5]
    assert main([*again, "--learning-rate", "1e-3"]) == 0
    assert [row["step"] for row in rows(out)] == list(range(1, 9))
    assert json.loads((out / "run.json").read_text())["earlier"] == [
        {"until_step": 5, "learning_rate": 0.003, "steps": 5},
        {"until_step": 5, "learning_rate": 3e38},
    ]
