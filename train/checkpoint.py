"""Checkpoints of the state and of the position in the data; a kill cannot damage one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import orbax.checkpoint as ocp

from train.step import TrainState

FOLDER = "checkpoints"


class Checkpointer:
    """The newest checkpoints of the run in `out`, one folder a step.

    A checkpoint is written under another name and renamed when it is whole; only then is one
    beyond the newest `keep` removed. Whenever the process dies, the folders with a step for a name
    are complete.
    """

    def __init__(self, out: Path, *, keep: int) -> None:
        self._manager = ocp.CheckpointManager(
            (out / FOLDER).absolute(),
            # Not in the background: the next step reuses the memory of this one's state.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Writes the state after `step` steps, and the data loader's `position`, as JSON."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            ),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and position saved after `step` steps.

        Args:
            like: the shapes, dtypes (and shardings) to restore to: a state of arrays or of
                jax.ShapeDtypeStruct.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["position"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._manager.close()
