"""The copy at Weights & Biases: what it gets, that it goes on, and that it stops nothing."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from train.__main__ import main
from train.run.metrics import Monitor
from train.run.tracker import Tracker, check


class Wandb:
    """Stands for the package, and notes what it is told."""

    def __init__(self, **broken: Exception) -> None:
        self.told: list[tuple] = []
        self.broken = broken
        self.config = SimpleNamespace(update=lambda *args, **options: self._note("config", *args))
        self.Settings = dict

    def _note(self, method: str, *arguments) -> None:
        self.told.append((method, *arguments))
        if method in self.broken:
            raise self.broken[method]

    def init(self, **options):
        self._note("init", options)
        return self

    def log(self, scalars, *, step):
        self._note("log", step, scalars)

    def finish(self, *, exit_code):
        self._note("finish", exit_code)


@pytest.fixture
def installed(monkeypatch):
    def install(**broken) -> Wandb:
        wandb = Wandb(**broken)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return install


def trained(out, tracker: Tracker, steps=(1, 2)) -> None:
    out.mkdir(exist_ok=True)
    with Monitor(out, 9, console=Console(quiet=True), tracker=tracker, log_every=2) as monitor:
        for step in steps:
            monitor.step(step, {"loss": float(step), "tokens": 0})
        monitor.evaluation(2, {"token_nll": 2.5})


def test_it_gets_what_the_files_get_and_a_resumed_run_goes_on_in_the_same_place(
    tmp_path, installed
):
    wandb = installed()
    trained(tmp_path, Tracker.start("ours", tmp_path, {"seed": 3}))
    (_, first), flags, row, scores, end = wandb.told
    assert (first["project"], first["resume"]) == ("ours", "allow")
    assert (first["dir"], first["name"]) == (str(tmp_path), tmp_path.name)
    assert flags == ("config", {"seed": 3})
    assert row[:2] == ("log", 2)
    assert row[2].items() >= {"train/loss": 2.0, "train/tokens": 0}.items()
    assert scores == ("log", 2, {"held_out/token_nll": 2.5})
    assert end == ("finish", 0)

    noted = json.loads((tmp_path / "wandb.json").read_text())
    assert noted == {"project": "ours", "id": first["id"]}
    Tracker.start("ours", tmp_path, {})
    assert wandb.told[5][1] == first
    Tracker.start("theirs", tmp_path, {})
    assert wandb.told[7][1]["id"] != first["id"]


def test_a_run_that_fails_is_marked_so(tmp_path, installed):
    wandb = installed()
    with (
        pytest.raises(ArithmeticError),
        Monitor(
            tmp_path, 9, console=Console(quiet=True), tracker=Tracker.start("ours", tmp_path, {})
        ),
    ):
        raise ArithmeticError
    assert wandb.told[-1] == ("finish", 1)


@pytest.mark.parametrize("method", ["init", "config", "log", "finish"])
def test_what_fails_there_is_said_once_and_stops_nothing(tmp_path, installed, caplog, method):
    wandb = installed(**{method: ConnectionError("no network\nat all")})
    trained(tmp_path, Tracker.start("ours", tmp_path, {}), steps=(1, 2, 3, 4))
    [message] = caplog.messages
    assert message.startswith("wandb: no network; ")
    assert [told[0] for told in wandb.told].count(method) == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 2]


def test_without_the_package_nothing_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["--wandb", "ours", "--out", str(tmp_path / "run")]) == 2
    assert '--wandb needs a package: pip install ".[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # a folder wandb/ here
    with pytest.raises(ValueError, match="needs a package"):
        check("ours")
    check(None)


def test_nobody_imports_it_unasked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trained(tmp_path, Tracker.start(None, tmp_path, {}))
    assert not (tmp_path / "wandb.json").exists()
