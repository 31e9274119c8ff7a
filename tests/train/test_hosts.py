"""Two processes train as one with two devices does, to the bit, and tell each other of an end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from paths import ROOT

from train import hosts, mesh
from train.run.folder import CHECKPOINTS, METRICS
from train.run.metrics import Monitor
from train.run.options import HostOptions, MeshShape
from train.run.signals import stop_requests

RUN = """
import os, signal, sys
from train.run import loop
from train.__main__ import main

class Killer(loop.Monitor):
    def step(self, step, values):
        super().step(step, values)
        if step == int(os.environ.get("KILLED_AFTER", 0)):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

loop.Monitor = Killer
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def records(tmp_path) -> Path:
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"after {number}", "completion": f"comes {following}"}
        for number, following in itertools.pairwise(numbers)
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    return path


def start(out: Path, *flags: str | Path, devices: int = 1, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, "--out", out, *flags],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # much is compiled and little run
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **more,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(out: Path, *flags: str | Path, second: tuple[str, ...] = (), **of_second: str):
    """The second has more flags, and more in its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    these = [*flags, "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    return start(out, *these, "0"), start(out, *these, "1", *second, **of_second)


def ends(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit status and what was printed, of each."""
    try:
        return [
            (process.returncode, *printed)
            for process, printed in [(p, p.communicate(timeout=300)) for p in processes]
        ]
    finally:
        for process in processes:
            process.kill()


def learnt(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    timed = ("tokens_per_second", "input_wait")
    return [{name: row[name] for name in row if name not in timed} for row in rows]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, records, monkeypatch):
    """Stopped by a signal to the one that writes nothing; from a checkpoint of both one process
    with as many devices goes on to the same bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [
        *("--data", records, "--model", "nano", "--vocab-size", "300", "--max-length", "32"),
        *("--batch-size", "2", "--mesh", "fsdp=2", "--steps", "4", "--held-out", "0.2"),
        *("--eval-every", "3", "--checkpoint-every", "2", "--samples", "1"),
    ]
    out = tmp_path / "run"
    for number, (status, printed, said) in enumerate(
        ends(*start_two(out, *flags, KILLED_AFTER="2", SIGNAL=str(int(signal.SIGTERM))))
    ):
        assert status == 128 + signal.SIGTERM, said
        assert "SIGTERM: stopped after step 3, which is saved" in said  # what was begun is done
        assert ("held-out token_nll" in printed) == (number == 0)
    stopped = learnt(out)
    assert [row["step"] for row in stopped] == [1, 2, 3, 3]

    shutil.rmtree(out / CHECKPOINTS / "3")
    ((status, printed, said),) = ends(start(out, "--resume", devices=2))
    assert status == 0, said
    assert "Held-out evaluation" in printed
    assert learnt(out)[: len(stopped)] == stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("--seed", "1"), "process 1 has other flags, data or checkpoints than process 0"),
        (("--model", "/nowhere"), "/nowhere"),
    ],
    ids=["another seed", "no model"],
)
def test_what_one_cannot_train_all_refuse(second, message, tmp_path, records, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [
        *("--data", records, "--model", "nano", "--vocab-size", "300", "--mesh", "fsdp=2"),
        *("--batch-size", "2", "--held-out", "0", "--steps", "2"),
    ]
    for status, _, said in ends(*start_two(tmp_path / "run", *flags, second=second)):
        assert status == 2
        assert message in said.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "node0"}, "must be auto or like node0:9876"),
        ({"coordinator": "node0:x"}, "must be auto or like node0:9876"),
        ({"coordinator": "node0:9876"}, "needs --processes and --process"),
        ({"coordinator": "auto", "process": 1}, "have no meaning with --coordinator auto"),
        ({"processes": 2}, "have no meaning with no --coordinator"),
        (
            {"coordinator": "node0:9876", "processes": 2, "process": 2},
            r"must be in \[0, 2\), not 2",
        ),
        ({"coordinator": "node0:9876", "processes": 0, "process": 0}, "must be at least 1, not 0"),
    ],
)
def test_who_is_meant_must_be_said(flags, message):
    with pytest.raises(ValueError, match=message):
        HostOptions(**flags)
    HostOptions(coordinator="[::1]:9876", processes=2, process=1)


def test_process_0_is_looked_for_first(monkeypatch):
    """JAX would end the process where it is missing, or there twice."""
    monkeypatch.setattr(hosts, "SECONDS_TO_MEET", 0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        there = f"127.0.0.1:{other.getsockname()[1]}"
        hosts.join(HostOptions())
        with pytest.raises(ValueError, match=f"{there}: process 0 cannot listen there"):
            hosts.join(HostOptions(coordinator=there, processes=2, process=0))
    with pytest.raises(ValueError, match=f"{there}: process 0 cannot be reached there"):
        hosts.join(HostOptions(coordinator=there, processes=2, process=1))


def test_alone_there_is_nothing_to_wait_for():
    asked = hosts.agree(lambda: signal.SIGTERM)
    assert hosts.alike("this", lambda: ("text", 7)) == 7
    assert asked() == signal.SIGTERM
    assert hosts.first()
    assert hosts.leave(3) == 3
    with pytest.raises(jax.errors.JaxRuntimeError, match="as it is"), hosts.together():
        raise jax.errors.JaxRuntimeError("as it is")
    assert hosts.lost(jax.errors.JaxRuntimeError()) is None


def test_of_several_all_devices_are_taken(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    mesh.check(MeshShape(data=2, fsdp=2))
    with pytest.raises(ValueError, match="has 2 devices, and the 2 processes have 4"):
        mesh.check(MeshShape(data=2))
    gone = jax.errors.JaxRuntimeError("gone\nsince yesterday")
    with (
        pytest.raises(ConnectionError, match=r"cannot go on with the others \(gone\).*--resume"),
        hosts.together(),
    ):
        raise ValueError("cannot be read") from gone  # as a library says it
    with pytest.raises(KeyError), hosts.together():
        raise KeyError


def test_one_of_several_writes_and_shows_nothing(tmp_path, capsys):
    with Monitor(tmp_path, 2) as monitor:
        monitor.step(1, {"loss": 1.0})
        monitor.evaluation(1, {"token_nll": 2.0})
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with Monitor(tmp_path, 2, start_step=1, silent=True) as monitor:
        assert monitor.evaluated == {1: 2.0}
        monitor.step(2, {"loss": 1.0})
        monitor.evaluation(2, {"token_nll": 1.0})
        assert monitor.evaluated == {1: 2.0, 2: 1.0}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written
    assert capsys.readouterr().out == ""


def test_what_others_do_as_well_is_not_abandoned():
    with stop_requests(alone=False) as stop:
        with stop.at_once():
            signal.raise_signal(signal.SIGTERM)
            reached = True
        assert stop.signum == signal.SIGTERM
    assert reached
