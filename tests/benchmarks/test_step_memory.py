"""The memory of a step on several devices: what is refused, and what is compiled for."""

import importlib.util
import json

import jax
import pytest

from benchmarks import step_memory
from benchmarks.steps import memory


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rows 0", "--rows must be at least 1, not 0"),
        ("--length 7", "--length must be at least 8, not 7"),
        ("--model huge", "--model huge: must be one of nano, "),
        ("--mesh fsdp=two", "--mesh fsdp=two: must be like data=2,fsdp=4"),
        ("--json .", "--json . is a folder: name a file"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert step_memory.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.step_memory: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, step_memory.PLUGINS)), reason="needs jax's CUDA plugin"
)
def test_fsdp_takes_half_of_the_state_and_gathers_shares_in_bfloat16(tmp_path, monkeypatch):
    programs = []

    def compiled(*args):
        programs.append(original(*args))
        return programs[-1]

    original = memory.compiled
    monkeypatch.setattr(memory, "compiled", compiled)
    flags = "--model nano --rows 2 --length 64 --remat none --mesh fsdp=2 --json"
    assert step_memory.main([*flags.split(), str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    state, program = programs[0]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert 0.5 * whole < row["found"]["state"] < 0.51 * whole

    lines = program.as_text().splitlines()
    moved = {
        name: [line.split("=", 1)[1].lstrip(" (") for line in lines if f" {name}-start(" in line]
        for name in ("all-gather", "reduce-scatter")
    }
    # The head and its gradient; besides, the matrices of a layer and theirs.
    assert any(line.startswith("bf16[8192,32]") for line in moved["all-gather"])
    assert any(line.startswith("bf16[8192,64]") for line in moved["reduce-scatter"])
    for name, found in moved.items():
        assert found, name
        assert not any("f32[" in line.split(")")[0] for line in found), found
