"""Checkpoints of the state and of the position in the data; a kill cannot damage one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from train import files, hosts
from train.run.folder import BEST, CHECKPOINTS
from train.run.state import TrainState


class Checkpointer:
    """The newest checkpoints of the run in `out` and the best, one folder a step.

    A checkpoint is written under another name and renamed when it is whole; only then is one
    removed that is neither among the newest `keep` nor the best. Whenever the process dies, the
    folders with a step for a name are complete.
    """

    def __init__(self, out: Path, *, keep: int) -> None:
        self._folder = (out / CHECKPOINTS).absolute()
        self._keep = keep
        self._note = out / BEST
        self._best = _Best()
        self._manager = ocp.CheckpointManager(
            self._folder,
            # Compressed, weights are 8% smaller and written at half the speed or less, and Orbax
            # holds a second copy of all that is on its way to the disk.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "position": ocp.JsonCheckpointHandler(),
            },
            # Not in the background: the next step reuses the memory of this one's state.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), self._best]),
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def would_be_best(self, step: int, scores: Mapping[int, float | None]) -> bool:
        """Whether `step` has a held-out NLL, and none that is saved has one as low."""
        nll, saved = scores.get(step), (scores.get(other) for other in self.steps())
        return nll is not None and all(other is None or nll < other for other in saved)

    def mark_best(self, scores: Mapping[int, float | None]) -> None:
        """Notes in best.json which checkpoint is the best, and keeps that one besides the newest.

        Args:
            scores: the held-out NLL after each step that has one; the least is best, and of equal
                ones the first. Where no checkpoint has one, there is no best.
        """
        found = [(nll, step) for step in self.steps() if (nll := scores.get(step)) is not None]
        if not found:
            self._best.step = None
            if hosts.first():
                self._note.unlink(missing_ok=True)
            return
        nll, self._best.step = min(found)
        if hosts.first():
            files.write_json(self._note, {"step": self._best.step, "token_nll": nll})
        for step in self.steps()[: -self._keep]:
            if step != self._best.step:
                self._manager.delete(step)

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Writes the state after `step` steps, and the data loader's `position`, as JSON.

        Raises OSError if it cannot be written; the checkpoints before are as they were.
        """
        kept = self.latest_step()
        # An array keeps what the host has read of it, which on a CPU is itself: the next step could
        # not write over it, and would need as much memory again.
        seen = jax.tree.map(_unread, state)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(seen), position=ocp.args.JsonSave(position)
        )
        try:
            with said_once():
                self._manager.save(step, args=items)
        except (OSError, ValueError) as error:  # TensorStore's of a full disk is a ValueError
            if hosts.lost(error):
                raise
            for begun in self._folder.glob(f"{step}.*"):  # a full disk is less full without it
                shutil.rmtree(begun, ignore_errors=True)
            before = f"the checkpoint of step {kept} is kept" if kept else "there is none before"
            raise OSError(
                f"cannot save step {step} in {self._folder} ({_reason(error)}); {before}"
            ) from None

    def position(self, step: int) -> dict[str, Any]:
        """The data loader's position after `step` steps; ValueError if it cannot be read."""
        return self._read(step, "position", ocp.args.JsonRestore())

    def state(self, step: int, like: TrainState) -> TrainState:
        """The state after `step` steps; ValueError if it cannot be read.

        Args:
            like: the shapes, dtypes (and shardings) to restore to: a state of arrays or of
                jax.ShapeDtypeStruct.
        """
        where = ocp.checkpoint_utils.construct_restore_args(like)
        return self._read(step, "state", ocp.args.PyTreeRestore(like, restore_args=where))

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            with said_once():
                return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # of any kind, whatever is damaged
            if hosts.lost(error):
                raise
            before = [other for other in self._manager.all_steps() if other < step]
            instead = f"step {max(before)}" if before else "the beginning"
            if_all = "if all processes say so, " if hosts.count() > 1 else ""
            raise ValueError(
                f"{self._folder / str(step)} cannot be read ({item}: {first_line(error)}):"
                f" {if_all}remove that folder to go on from {instead}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._manager.close()


def _unread(x: jax.Array) -> jax.Array:
    """The same array to others: what they read of it goes with it."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def saved_steps(out: Path) -> list[int]:
    """The steps that the run in `out` has checkpoints of, oldest first. Only looks."""
    folder = out / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def choose(out: Path, which: str) -> int:
    """The step that `last`, `best` or a number names among the checkpoints of the run in `out`.

    Only looks: the run may be writing its next one.

    Raises:
      ValueError: for another name, for a step without a checkpoint, and where none is noted as the
        best.
    """
    steps = saved_steps(out)
    if not steps:
        raise ValueError(f"{out} has no checkpoint yet")
    if which == "last":
        return steps[-1]
    step = _noted(out / BEST) if which == "best" else int(which) if which.isdecimal() else None
    if step not in steps:
        have = f"one of {', '.join(map(str, steps))}, the steps that {out} has"
        raise ValueError(
            f"{out / BEST} names step {step}, whose checkpoint is gone: --checkpoint takes {have}"
            if which == "best"
            else f"--checkpoint must be best, last or {have}, not {which}"
        )
    return step


def _noted(note: Path) -> int:
    if not note.is_file():
        raise ValueError(
            f"{note.parent} has no best checkpoint, since none was evaluated on held-out records:"
            " --eval-every does that"
        )
    try:
        return int(json.loads(note.read_text("utf-8"))["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{note} is damaged ({error!r})") from None


@dataclasses.dataclass
class _Best:
    """A policy of Orbax's. Its own `BestN` wants the score when it saves; ours may come later, as
    at the end of a run, which is saved before it is evaluated."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Keeps quiet what is raised here as well: Orbax's threads and asyncio log it with a traceback
    each, and TensorStore prints one for each file whose end finds their event loop closed by it."""
    logs, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    before = [log.disabled for log in logs]

    def print_others(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    for log in logs:
        log.disabled = True
    sys.unraisablehook = print_others
    yield
    # Not after an error, of which more is still to come.
    for log, disabled in zip(logs, before, strict=True):
        log.disabled = disabled
    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    """What the system says, which TensorStore has at the end of a long line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else first_line(error)


def first_line(error: Exception) -> str:
    """TensorStore goes on for hundreds of lines, and Orbax ends with where to see more."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0].partition(" See full ")[0][:200]
