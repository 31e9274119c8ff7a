"""`--memory`: which way to compute a step is taken, that it is kept, and what a program holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from train.config import TrainConfig
from train.models.config import PRESETS
from train.run import folder, step
from train.run.memory import GB, choose, compiled_bytes, ways
from train.run.optimizer import optimizer
from train.run.options import StepOptions
from train.run.prepare import prepare
from train.run.state import state_maker
from train.run.step import train_step


def test_more_is_recomputed_before_rows_are_divided_and_each_device_keeps_some():
    found = [
        (remat, step.batch_size, step.accumulate)
        for remat, step in ways(StepOptions(batch_size=12, accumulate=2, mesh="data=2,fsdp=1"))
    ]
    assert found == [
        (remat, rows, 24 // rows) for rows in (12, 6, 4, 2) for remat in ("none", "block", "full")
    ]


SIZES = {"none": 5, "block": 2, "full": 1}


def size(remat: str, step: StepOptions) -> int:
    """A gigabyte of weights, and some for each row."""
    return 10**9 * (1 + SIZES[remat] * step.batch_size)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (21, ("none", 4)),
        (20.9, ("block", 4)),
        (8, ("full", 4)),
        (4.5, ("full", 2)),
        (2, ("full", 1)),
    ],
)
def test_the_first_way_that_fits_is_taken(memory, expected):
    remat, step = choose(StepOptions(batch_size=4, accumulate=3, memory=memory), size)
    assert (remat, step.batch_size) == expected
    assert step.rows == 12


def test_where_none_fits_the_least_is_named():
    with pytest.raises(ValueError, match=r"--memory 1\.5: a step takes 2 GB at least, with --rem"):
        choose(StepOptions(memory=1.5), size)
    with pytest.raises(ValueError, match="--memory must be"):
        StepOptions(memory=0)


def test_a_program_holds_its_arguments_its_results_and_what_is_between():
    def function(x):
        return jnp.fft.ifft(jnp.fft.fft(x) ** 2).real  # two of complex64, not in one pass

    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    kept, reused = (
        compiled_bytes(jax.jit(function, donate_argnums=donated).lower(x).compile())
        for donated in ((), 0)
    )
    assert kept - reused == 4 * x.size
    assert reused >= 4 * x.size + 8 * x.size


@pytest.mark.slow
def test_a_step_of_smollm2_leaves_room_in_4_gb():
    """With the flags of fine-tuning; the process itself takes half a gigabyte beside it."""
    config = TrainConfig.defaults("smollm2-135m")
    shape = dataclasses.replace(PRESETS["smollm2-135m"], remat=config.model.remat)
    create = state_maker(shape, optimizer(config.optimizer), None)
    ids = jax.ShapeDtypeStruct((config.step.rows, config.data.max_length), jnp.int32)
    batch = dict.fromkeys(("tokens", "labels", "segments", "positions"), ids)
    lowered = train_step.lower(jax.eval_shape(create, 0), batch, 1e-5, config.loss, config.step)
    assert 1.5 < compiled_bytes(lowered.compile()) / GB < 3


def test_a_run_is_computed_as_was_chosen_and_goes_on_so(tmp_path, monkeypatch):
    asked = []

    def lower(state, batch, _rate, _loss, step):
        remat = state.model.config.remat
        assert batch["tokens"].shape == (8, 64)
        asked.append((remat, step.batch_size))
        of = 10**9 * {"none": 5, "block": 3, "full": 2}[remat] * step.batch_size
        names = ("argument", "output", "alias", "temp")
        sizes = {f"{name}_size_in_bytes": of for name in names}
        stats = SimpleNamespace(**sizes | {"temp_size_in_bytes": 0})
        return SimpleNamespace(compile=lambda: SimpleNamespace(memory_analysis=lambda: stats))

    monkeypatch.setattr(step, "train_step", SimpleNamespace(lower=lower))
    monkeypatch.chdir(tmp_path)
    data = Path("data.jsonl")
    lines = [{"prompt": f"{i} and {i}?", "completion": str(2 * i)} for i in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig.of(
        **{"model": "nano", "data": (data,), "out": tmp_path / "run", "held_out": 0.0},
        **{"max_length": 64, "vocab_size": 270, "batch_size": 8, "memory": 9.5},
    )
    run = prepare(config)
    tried = [(remat, rows) for rows in (8, 4) for remat in ("none", "block", "full")]
    assert asked == tried
    assert run.config == folder.load(tmp_path / "run")
    assert (run.config.model.remat, run.config.step.accumulate) == ("full", 2)
    assert run.state.model.config.remat == "full"

    with pytest.raises(ValueError, match=r"weights and moments alone take 0\.\d+ GB"):
        prepare(config.replace(memory=1e-4, out=tmp_path / "other"))

    again = folder.load(tmp_path / "run").replace(resume=True)
    resumed = prepare(again).config
    assert asked == tried
    assert (resumed.model.remat, resumed.step) == (run.config.model.remat, run.config.step)
    less = prepare(again.replace(memory=5)).config
    assert asked[len(tried) :] == [*tried[3:], *((remat, 2) for remat in ("none", "block", "full"))]
    assert less.step.batch_size == 2
