"""What a run makes of its configuration before the first step, and in which order it goes on."""

import dataclasses
import json
import signal
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import TrainConfig
from train.models import attention
from train.models.config import MOST_WRITTEN_OUT, PRESETS
from train.run import loop
from train.run.checkpoint import Checkpointer
from train.run.prepare import Run, written_out
from train.run.samples import Prompts
from train.run.step import StepMetrics


@pytest.mark.parametrize(
    ("backend", "layers", "repeatable", "kernels", "scan"),
    [
        ("gpu", MOST_WRITTEN_OUT, False, "cudnn", "off"),
        ("gpu", MOST_WRITTEN_OUT, True, "cudnn", "on"),
        ("gpu", MOST_WRITTEN_OUT, True, "auto", "off"),
        ("gpu", MOST_WRITTEN_OUT + 1, False, "auto", "on"),
        ("cpu", 2, False, "auto", "on"),
    ],
)
def test_layers_are_written_out_where_that_pays(
    monkeypatch, backend, layers, repeatable, kernels, scan
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention, "capability", lambda: "9.0")
    shape = PRESETS["smollm2-135m"]
    shape = dataclasses.replace(shape, layers=layers, dtype="bfloat16", attention=kernels)
    assert written_out(shape, repeatable=repeatable) == dataclasses.replace(shape, scan=scan)


class OnDevice:
    """A number that is known once the device is done with its step."""

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __array__(self, *_arguments, **_options):
        self.read()
        return np.asarray(self.value)


class Batches:
    def __next__(self):
        return None


@pytest.fixture
def happened(tmp_path, monkeypatch):
    """Trains with every part of the loop a stub; returns the order in which they were called."""

    def train(total_steps, first_step=0, nan_at=None, signal_at=None, nll=float, **flags):
        order = []

        def take_step(state, _batch, _rate, *_options):
            step = state.step + 1
            order.append(f"begin {step}")
            if step == signal_at:
                signal.raise_signal(signal.SIGTERM)
            finite = OnDevice(step != nan_at, lambda: order.append(f"read {step}"))
            return SimpleNamespace(step=step, model=step), StepMetrics(
                jnp.float32(1.0), 1.0, 10, 0.5, 0.1, finite
            )

        def evaluate(model, *_):
            order.append(f"evaluate {model}")
            return model

        checkpointer = Checkpointer(tmp_path, keep=1)
        really_save = checkpointer.save

        def save(step, state, position):
            assert step == state.step
            order.append(f"save {step}")
            really_save(step, {"step": jnp.int32(step)}, position)

        monkeypatch.setattr(checkpointer, "save", save)
        monkeypatch.setattr(loop, "step_of", lambda _options: take_step)
        monkeypatch.setattr(loop, "evaluate", evaluate)
        monkeypatch.setattr(loop, "headline", lambda step: {"token_nll": nll(step)})
        monkeypatch.setattr(loop, "report", mock.Mock())
        start = SimpleNamespace(step=first_step, model=first_step)
        data = SimpleNamespace(train=Batches(), position=dict)
        config = TrainConfig.of(checkpoint_every=4, **flags)
        prompts = Prompts([], [], mock.Mock())
        parts = (tmp_path, data, None, prompts, float, checkpointer, start)
        run = Run(config, *parts, first_step, total_steps)
        try:
            loop.train(run)
        except (loop.NotFiniteError, loop.Interrupted) as error:
            order.append(type(error).__name__)
        return order

    return train


def test_the_next_step_begins_before_the_last_one_s_metrics_are_read(happened):
    """And what is evaluated or saved is known to be finite."""
    assert happened(5, eval_every=2) == [
        *("begin 1", "begin 2", "read 1", "read 2", "evaluate 2", "save 2"),
        *("begin 3", "begin 4", "read 3", "read 4", "evaluate 4", "save 4"),
        *("begin 5", "read 5", "save 5", "evaluate 5"),
    ]


@pytest.mark.parametrize("step", [3, 4])
def test_a_state_after_a_nan_is_never_saved(happened, step):
    assert happened(9, nan_at=step) == [
        *("begin 1", "begin 2", "read 1", "begin 3", "read 2", "begin 4", "read 3"),
        *(["read 4"] if step == 4 else []),
        "NotFiniteError",
    ]


def test_a_signal_saves_the_step_that_has_begun(happened):
    assert happened(9, signal_at=2) == [
        *("begin 1", "begin 2", "read 1", "read 2", "save 2", "Interrupted")
    ]


def test_a_nan_in_the_step_that_a_signal_waits_for_is_not_saved(happened):
    assert happened(9, signal_at=2, nan_at=2)[-2:] == ["read 2", "NotFiniteError"]


def test_what_is_best_so_far_is_saved_and_kept_over_a_resumed_run(happened, tmp_path):
    nll = {2: 3.0, 4: 1.0, 5: 2.0, 6: 1.5, 8: 1.5, 9: 1.0}.get
    assert [what for what in happened(5, nll=nll, eval_every=2) if "save" in what] == [
        *("save 2", "save 4", "save 5")
    ]
    more = happened(9, first_step=5, nll=nll, eval_every=2)
    assert [what for what in more if "save" in what] == ["save 8", "save 9"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "9"}
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "token_nll": 1.0}


def test_a_run_that_is_best_at_its_end_says_so(happened, tmp_path):
    happened(6, nll=lambda step: -step, eval_every=4)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"6"}
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 6, "token_nll": -6}
