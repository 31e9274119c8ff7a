"""The monitor: rows that survive a kill, TensorBoard events, the bar and the plain lines."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT
from rich.console import Console
from tensorboardX.proto import event_pb2

from train.run.metrics import Monitor, as_number, cut_rows_after
from train.run.progress import duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(out: Path) -> list:
    """Every event in every file, oldest file first: [length 8][crc 4][data][crc 4]."""
    found = []
    for file in sorted((out / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def scalars(out: Path) -> dict[tuple[str, int], float]:
    return {(v.tag, e.step): v.simple_value for e in events(out) for v in e.summary.value}


def text_console(**options) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=100, **options), text


def test_a_row_a_step_with_tokens_per_second(tmp_path):
    clock = Clock()
    console, _ = text_console()
    with Monitor(tmp_path, 2, console=console, clock=clock) as monitor:
        clock.now += 2.0
        monitor.step(1, {"loss": jnp.float32(5.1), "tokens": jnp.int32(300)})
        clock.now += 4.0
        monitor.step(2, {"loss": np.float32(4.9), "tokens": 100})
    first, last = rows(tmp_path)
    assert first == {
        "step": 1,
        "loss": float(np.float32(5.1)),
        "tokens": 300,
        "tokens_per_second": 150.0,
        "input_wait": 0.0,
    }
    assert last["tokens_per_second"] == 25.0
    assert scalars(tmp_path)["train/loss", 2] == np.float32(4.9)


def test_log_every_counts_the_tokens_between_rows_and_always_ends_with_a_row(tmp_path):
    clock = Clock()
    console, _ = text_console()
    with Monitor(tmp_path, 7, log_every=3, console=console, clock=clock) as monitor:
        for step in range(1, 8):
            clock.now += 1.0
            monitor.step(step, {"loss": 1.0, "tokens": 10 * step})
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 7]
    assert [row["tokens_per_second"] for row in rows(tmp_path)] == [20.0, 50.0, 70.0]


def test_values_stay_on_the_device_between_rows(tmp_path):
    class Unread:
        def item(self):
            raise AssertionError("read at a step without a row")

    console, _ = text_console()
    with Monitor(tmp_path, 4, log_every=2, console=console) as monitor:
        monitor.step(1, {"loss": Unread(), "tokens": 1})
        with pytest.raises(AssertionError, match="without a row"):
            monitor.step(2, {"loss": Unread(), "tokens": 1})


def test_pauses_are_not_training_time(tmp_path):
    clock = Clock()
    console, _ = text_console()
    with Monitor(tmp_path, 1, console=console, clock=clock) as monitor:
        clock.now += 1.0
        with monitor.paused():
            clock.now += 50.0
        monitor.step(1, {"loss": 1.0, "tokens": 40})
    assert rows(tmp_path)[0]["tokens_per_second"] == 40.0


def test_a_device_that_is_busy_does_not_wait(tmp_path):
    clock = Clock()
    console, _ = text_console()
    with Monitor(tmp_path, 2, console=console, clock=clock) as monitor:
        for step, busy in ((1, True), (2, False)):
            with monitor.waiting(lambda busy=busy: busy):
                clock.now += 0.25
            clock.now += 0.75
            monitor.step(step, {"loss": 1.0, "tokens": 1})
    assert [row["input_wait"] for row in rows(tmp_path)] == [0.0, 0.25]


def test_the_share_of_the_time_that_waits_for_data(tmp_path):
    clock = Clock()
    console, text = text_console()
    with Monitor(tmp_path, 3, log_every=2, console=console, clock=clock) as monitor:
        for step in (1, 2, 3):
            with monitor.waiting():
                clock.now += 0.25
            clock.now += 0.75 * step
            with monitor.paused():
                clock.now += 9.0
            monitor.step(step, {"loss": 1.0, "tokens": 1})
        monitor.say_waited()
    assert [row["input_wait"] for row in rows(tmp_path)] == [0.5 / 2.75, 0.1]
    assert "waited for data in 14.29% of the time" in text.getvalue()  # 0.75 of 5.25 s


def test_evaluations_have_rows_and_tags_of_their_own(tmp_path):
    console, text = text_console()
    with Monitor(tmp_path, 1, console=console) as monitor:
        monitor.step(1, {"loss": 1.0, "tokens": 1})
        monitor.evaluation(1, {"nll": 2.5, "ece": np.float32(0.25)})
    assert rows(tmp_path)[1] == {"step": 1, "held_out_nll": 2.5, "held_out_ece": 0.25}
    assert scalars(tmp_path)["held_out/nll", 1] == 2.5
    assert "step 1: held-out nll 2.5  ece 0.25" in text.getvalue()


def test_numbers_are_exact_and_json_stays_json(tmp_path):
    third = np.float32(1) / np.float32(3)
    assert np.float32(json.loads(json.dumps(as_number(third)))) == third
    assert as_number(np.float32("nan")) is None
    assert as_number(-math.inf) is None
    console, _ = text_console()
    with Monitor(tmp_path, 1, console=console) as monitor:
        monitor.step(1, {"loss": math.nan, "tokens": 1})
    assert rows(tmp_path)[0]["loss"] is None
    assert ("train/loss", 1) not in scalars(tmp_path)


def test_resuming_cuts_the_rows_beyond_the_checkpoint(tmp_path):
    console, _ = text_console()
    with Monitor(tmp_path, 9, console=console) as monitor:
        for step in range(1, 8):
            monitor.step(step, {"loss": float(step), "tokens": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the row a kill cut in two
    with Monitor(tmp_path, 9, start_step=5, console=console) as monitor:
        for step in range(6, 10):
            monitor.step(step, {"loss": 10.0 * step, "tokens": 1})
    expected = [1, 2, 3, 4, 5, 60, 70, 80, 90]
    assert [row["loss"] for row in rows(tmp_path)] == expected
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    restarts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert restarts == [1, 6]


def test_a_step_is_evaluated_once_however_often_a_run_ends_there(tmp_path):
    console, _ = text_console()
    for start in (0, 2, 2):
        with Monitor(tmp_path, 2, start_step=start, console=console) as monitor:
            assert monitor.evaluated == ({1: 3.0, 2: 2.0} if start else {})
            if not start:
                monitor.step(1, {"loss": 1.0, "tokens": 1})
                monitor.evaluation(1, {"token_nll": 3.0})
                monitor.step(2, {"loss": 1.0, "tokens": 1})
            monitor.evaluation(2, {"token_nll": 2.0})
    held_out = [row for row in rows(tmp_path) if "held_out_token_nll" in row]
    assert [(row["step"], row["held_out_token_nll"]) for row in held_out] == [(1, 3.0), (2, 2.0)]


def test_a_new_run_starts_an_empty_file(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n')
    cut_rows_after(metrics, 0)
    assert metrics.read_text() == ""


@pytest.mark.parametrize("line", ["not json\n", "[1]\n", '{"loss": 1}\n', '{"step": "x"}\n'])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, line):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n' + line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a row"):
        cut_rows_after(metrics, 1)
    assert metrics.read_text().endswith(line)


KILLED = """
import os, signal, sys
from pathlib import Path
from train.run.metrics import Monitor
with Monitor(Path(sys.argv[1]), 10) as monitor:
    for step in (1, 2, 3):
        monitor.step(step, {"loss": 1.0, "tokens": 1})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_loses_no_finished_row(tmp_path):
    root = ROOT
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, env={**os.environ}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert ("train/loss", 3) in scalars(tmp_path)


def test_plain_lines_are_few_and_readable(tmp_path):
    clock = Clock()
    console, text = text_console()
    with Monitor(tmp_path, 300, console=console, clock=clock) as monitor:
        for step in range(1, 301):
            clock.now += 0.1
            monitor.step(step, {"loss": 4.25, "tokens": 1234})
    lines = text.getvalue().splitlines()
    assert lines[0] == "step   1/300  loss 4.2500   12,340 tokens/s  0:00:30 left"
    assert lines[-1] == "step 300/300  loss 4.2500   12,340 tokens/s  0:00:00 left"
    assert 6 <= len(lines) <= 8


def test_the_bar_on_a_terminal(tmp_path):
    console, text = text_console(force_terminal=True)
    with Monitor(tmp_path, 4, console=console) as monitor:
        monitor.step(1, {"loss": 4.25, "tokens": 5})
        monitor.say("a line [with] brackets")
        for step in (2, 3, 4):
            monitor.step(step, {"loss": 3.5, "tokens": 5})
    shown = text.getvalue()
    assert "4/4" in shown
    assert "loss 3.5000" in shown
    assert "tokens/s" in shown
    assert "a line [with] brackets" in shown


def test_an_impossible_start_is_refused(tmp_path):
    with pytest.raises(ValueError, match="start_step=11"):
        Monitor(tmp_path, 10, start_step=11)


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]


SILENCED = """
import sys
from pathlib import Path
from train.run.metrics import Monitor
with Monitor(Path(sys.argv[1]), 400) as monitor:
    for step in range(1, 401):
        monitor.step(step, {"loss": 1.0, "tokens": 1})
        monitor.say("x" * 1000)
"""


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    root = ROOT
    command = [sys.executable, "-c", SILENCED, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")
    assert len(rows(tmp_path)) == 400
