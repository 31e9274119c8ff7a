"""What is saved comes back to the last bit; a kill in the middle of a save costs that save only."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paths import ROOT

from train import mesh
from train.models.config import PRESETS
from train.run.checkpoint import Checkpointer, choose
from train.run.folder import BEST, CHECKPOINTS
from train.run.optimizer import adamw
from train.run.state import TrainState, state_maker

OPTIMIZER = adamw(beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0)
POSITION = {"identity": "0af3", "iterator": {"next_index": 12}}


@jax.jit
def create(seed: int) -> TrainState:
    key = jax.random.key(seed)
    return TrainState.create(nnx.Linear(3, 5, rngs=nnx.Rngs(params=key)), OPTIMIZER, key)


def bits(state: TrainState) -> list[np.ndarray]:
    leaves = jax.tree.leaves(state)
    return [
        np.asarray(jax.random.key_data(leaf) if leaf.dtype == state.key.dtype else leaf)
        for leaf in leaves
    ]


def test_a_checkpoint_holds_weights_optimizer_step_key_and_position(tmp_path):
    state = create(1)
    updates, opt_state = OPTIMIZER.update(state.params, state.opt_state, state.params)
    state = TrainState(
        state.step + 7, updates, opt_state, state.key, state.graphdef, state.optimizer
    )
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, state, POSITION)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.latest_step() == 7
        restored = checkpointer.state(7, like=jax.eval_shape(create, 0))
        position = checkpointer.position(7)
    assert position == POSITION
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    found, expected = bits(restored), bits(state)
    assert any(not np.array_equal(a, b) for a, b in zip(expected, bits(create(1)), strict=True))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_saved_state_is_written_over_by_the_next_step(tmp_path):
    """Else the step after each checkpoint would need room for another state."""
    state = create(1)
    largest = max(jax.tree.leaves(state.params), key=lambda x: x.size)
    where = largest.unsafe_buffer_pointer()
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, POSITION)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert step(largest).unsafe_buffer_pointer() == where


@pytest.mark.slow
def test_a_weight_above_a_gigabyte_is_saved(tmp_path):
    """Llama 3.2 1B's embedding has 1.05e9 bytes in float32."""
    large = jnp.asarray(np.append(np.zeros(250_000_000, np.float32), np.float32(7.0)))
    state = dataclasses.replace(create(1), params=nnx.State({"embedding": nnx.Param(large)}))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, POSITION)
        like = jax.eval_shape(lambda: state)
        found = checkpointer.state(1, mesh.placed(like, None)).params["embedding"][...]
    assert found.shape == large.shape
    np.testing.assert_array_equal(found[-3:], [0.0, 0.0, 7.0])


@pytest.mark.usefixtures("quickly_compiled")
def test_a_resumed_run_loads_the_program_that_the_new_one_compiled(tmp_path):
    """JAX compiles anew for arrays that are bound to a device, where others were not."""
    shape = dataclasses.replace(PRESETS["nano"], vocab_size=300)
    make = state_maker(shape, OPTIMIZER, None)
    state = make(0)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, POSITION)
        restored = checkpointer.state(1, mesh.placed(jax.eval_shape(make, 0), None))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert (one.committed, one.sharding) == (other.committed, other.sharding)


def test_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 10):
            checkpointer.save(step, create(step), POSITION)
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"2", "10"}


def saved(out: Path) -> set[int]:
    return {int(path.name) for path in (out / CHECKPOINTS).iterdir()}


def test_the_best_is_kept_besides_the_newest_and_noted(tmp_path):
    def note() -> dict:
        return json.loads((tmp_path / BEST).read_text())

    scores: dict[int, float | None] = {1: 3.0, 2: 2.0, 4: 2.0}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(step, create(step), POSITION)
            checkpointer.mark_best({s: nll for s, nll in scores.items() if s <= step})
        assert saved(tmp_path) == {2, 4}  # of equal ones the first
        assert note() == {"step": 2, "token_nll": 2.0}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.mark_best(scores)
        checkpointer.save(5, create(5), POSITION)
        assert saved(tmp_path) == {2, 5}
        assert choose(tmp_path, "best") == 2
        checkpointer.mark_best(scores | {5: 1.5, 6: 1.0})  # evaluated after it was saved
        assert saved(tmp_path) == {5}
        assert note() == {"step": 5, "token_nll": 1.5}
        checkpointer.mark_best({5: None})
        assert not (tmp_path / BEST).exists()


def test_a_checkpoint_is_named_by_its_step_or_its_rank(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="has no checkpoint yet"):
            choose(tmp_path, "last")
        (tmp_path / CHECKPOINTS).mkdir(exist_ok=True)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for step in (2, 10):
            checkpointer.save(step, create(step), POSITION)
        checkpointer.mark_best({2: 1.0, 10: 2.0})
    writing = tmp_path / CHECKPOINTS / "12.orbax-checkpoint-tmp"  # by the run, which goes on
    writing.mkdir()
    found = [choose(tmp_path, which) for which in ("last", "best", "2", "10")]
    assert found == [10, 2, 2, 10]
    assert writing.is_dir()
    for other in ("3", "12", "first"):
        with pytest.raises(ValueError, match=rf"best, last or one of 2, 10, .*, not {other}$"):
            choose(tmp_path, other)
    (tmp_path / BEST).write_text('{"step": 7}')
    with pytest.raises(
        ValueError, match=r"step 7, whose checkpoint is gone: .* takes one of 2, 10"
    ):
        choose(tmp_path, "best")
    for damaged in ("[2]", "{}", "{"):
        (tmp_path / BEST).write_text(damaged)
        with pytest.raises(ValueError, match=r"best\.json is damaged"):
            choose(tmp_path, "best")
    (tmp_path / BEST).unlink()
    with pytest.raises(ValueError, match=r"has no best checkpoint, .* --eval-every does that$"):
        choose(tmp_path, "best")


@pytest.mark.parametrize("damage", ["state", "position"])
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, damage):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, create(step), POSITION)
    folder = tmp_path / CHECKPOINTS / "2" / damage
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        file.write_bytes(b"")
    like = jax.eval_shape(create, 0)
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        read = {
            "state": lambda: checkpointer.state(2, like),
            "position": lambda: checkpointer.position(2),
        }
        with pytest.raises(
            ValueError, match=rf"2 cannot be read \({damage}: .*from step 1$"
        ) as caught:
            read[damage]()
        assert "\n" not in str(caught.value)
        assert checkpointer.position(1) == POSITION


def test_a_checkpoint_that_cannot_be_written_says_what_is_kept(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(1, create(1), POSITION)

        def full(*_args, **_options):
            raise ValueError("RESOURCE_EXHAUSTED: no space left\n" + "details\n" * 300)

        monkeypatch.setattr(checkpointer._manager, "save", full)
        with pytest.raises(
            OSError, match=r"cannot save step 2 .*\(RES.* left\); .* step 1 is kept$"
        ):
            checkpointer.save(2, create(2), POSITION)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
sys.path[:0] = sys.argv[2:]
from test_checkpoint import POSITION, create
from train.run.checkpoint import Checkpointer

with Checkpointer(Path(sys.argv[1]), keep=2) as checkpointer:
    checkpointer.save(1, create(1), POSITION)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    noise = np.random.default_rng(0).standard_normal((9, 100, 100), np.float32)
    large = {str(i): jnp.asarray(x) for i, x in enumerate(noise)}
    try:
        checkpointer.save(2, large, POSITION)
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def test_a_full_disk_is_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, tmp_path, Path(__file__).parent, ROOT / "tests"]
    # The cache of compiled programs has no room either, and would say so.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.stderr == ""
    assert process.stdout == (
        f"cannot save step 2 in {tmp_path / CHECKPOINTS} (File too large);"
        " the checkpoint of step 1 is kept\n"
    )
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["1"]


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from test_checkpoint import POSITION, create
from train.run.checkpoint import Checkpointer

def kill(event, arguments):
    # The folder of step 2 is filled under another name, and renamed once it is whole.
    began = event == "os.mkdir" and "/2." in str(arguments[0]) and "state" in str(arguments[0])
    whole = event == "os.rename" and str(arguments[1]).endswith("/2")
    if (began or whole) and event == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

with Checkpointer(Path(sys.argv[1]), keep=1) as checkpointer:
    checkpointer.save(1, create(1), POSITION)
    sys.addaudithook(kill)
    checkpointer.save(2, create(2), POSITION)
"""


@pytest.mark.parametrize("event", ["os.mkdir", "os.rename"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, event):
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-c",
        KILLED_SAVE,
        str(tmp_path),
        event,
        str(here),
        str(ROOT / "tests"),
    ]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(list((tmp_path / CHECKPOINTS).glob("2.*"))) == 1

    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored = checkpointer.state(1, like=jax.eval_shape(create, 0))
        position = checkpointer.position(1)
        assert position == POSITION
        for one, other in zip(bits(restored), bits(create(1)), strict=True):
            np.testing.assert_array_equal(one, other)
        checkpointer.save(2, create(2), POSITION)
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"2"}
