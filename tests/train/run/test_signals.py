"""SIGTERM and SIGINT are held back, abandon what may be abandoned, and do not wait twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from paths import ROOT

from train.run.signals import SIGNALS, stop_requests


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_come_back(signum):
    before = [signal.getsignal(s) for s in SIGNALS]
    with stop_requests() as stop:
        assert stop.signum is None
        assert [signal.getsignal(s) for s in SIGNALS] != before
        signal.raise_signal(signum)
        assert stop.signum == signum
        assert [signal.getsignal(s) for s in SIGNALS] == before
    assert [signal.getsignal(s) for s in SIGNALS] == before


@pytest.fixture
def interrupt_raises():
    """A shell starts what it puts into the background with SIGINT ignored, these tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupt_raises")
def test_a_second_signal_does_not_wait():
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.signum == signal.SIGTERM


def test_a_signal_abandons_what_is_done_at_once_and_nothing_after():
    reached = []
    with stop_requests() as stop:
        with stop.at_once():
            reached.append("before")
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:  # what a library might do
                reached.append("swallowed")
            reached.append("abandoned")
        reached.append("after")
    assert reached == ["before", "after"]
    assert stop.signum == signal.SIGTERM


def test_other_exceptions_pass_and_later_signals_wait_again():
    with stop_requests() as stop:
        with pytest.raises(ZeroDivisionError), stop.at_once():
            _ = 1 / 0
        signal.raise_signal(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM


INTERRUPTED = """
import os, runpy, sys

class Interrupt:
    "Sends this process a signal when it imports the module of that name."
    def find_spec(self, name, path, target=None):
        if name == module:
            os.kill(os.getpid(), int(signum))

module, signum, program = sys.argv[1:4]
del sys.argv[1:4]
sys.meta_path.insert(0, Interrupt())
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "signum", "program", "flags"),
    [
        ("argparse", signal.SIGINT, "train", []),
        ("tyro", signal.SIGTERM, "train", []),
        ("jax", signal.SIGINT, "train", ["--steps", "1"]),  # of what is imported after the flags
        ("tyro", signal.SIGINT, "train.sweep", []),
        ("jax", signal.SIGINT, "train.generate", ["run", "--prompt", "x"]),
        ("jax", signal.SIGTERM, "train.export", []),
    ],
)
def test_a_signal_during_imports_is_one_line(module, signum, program, flags, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, module, str(int(signum)), program, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.stderr == f"python -m {program}: {signum.name}: stopped\n"
    assert process.returncode == 128 + signum
    assert list(tmp_path.iterdir()) == []
