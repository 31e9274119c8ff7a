"""A copy of what a run measures at Weights & Biases, where `--wandb PROJECT` asks for one.

The run's own files have everything. So nothing that goes wrong there, as without a network, stops
training: it is said once, and the copy ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from train import files
from train.run.folder import WANDB_RUN

logger = logging.getLogger(__name__)

SECONDS_TO_REACH = 30.0
"""For the server, at the start and again at the end, before training goes on without it."""


def check(project: str | None) -> None:
    """Raises ValueError if a copy is asked for and the package is missing."""
    if project is not None:
        _package()


class Tracker:
    """One run at Weights & Biases, which goes on when the run is resumed."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def start(cls, project: str | None, out: Path, flags: Mapping[str, Any]) -> Self:
        """Begins the copy, or goes on with the one that the folder `out` notes.

        Args:
            project: its name; None for no copy.
            flags: the run's, as JSON can hold them.
        """
        if project is None:
            return cls(None)
        wandb = _package()
        try:
            run = wandb.init(
                project=project,
                id=_identity(out, project),
                name=out.name,
                dir=str(out),
                resume="allow",
                settings=wandb.Settings(
                    console="off", init_timeout=SECONDS_TO_REACH, finish_timeout=SECONDS_TO_REACH
                ),
            )
            run.config.update(dict(flags), allow_val_change=True)
        except Exception as error:  # of any kind, as the network's
            _say(error, "WANDB_MODE=offline keeps a copy in the run's folder, for wandb sync")
            return cls(None)
        return cls(run)

    def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
        """What was measured at a step. Wandb leaves out steps that it has already."""
        self._try("log", dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        self._try("finish", exit_code=int(failed))

    def _try(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **options)
        except Exception as error:
            _say(error, "the run's own files go on")
            self._run = None


def _identity(out: Path, project: str) -> str:
    """The id of the copy, which the folder keeps: another project gets another."""
    note = out / WANDB_RUN
    if note.is_file():
        noted = json.loads(note.read_text("utf-8"))
        if noted["project"] == project:
            return noted["id"]
    identity = secrets.token_hex(4)
    files.write_json(note, {"project": project, "id": identity})
    return identity


def _package() -> ModuleType:
    wandb = None
    with contextlib.suppress(ImportError):
        wandb = importlib.import_module("wandb")
    # A folder of that name, as the package leaves one, can be imported too, and has nothing.
    if wandb is None or not hasattr(wandb, "init"):
        raise ValueError('--wandb needs a package: pip install ".[wandb]"')
    return wandb


def _say(error: Exception, what_now: str) -> None:
    reason = str(error).strip().splitlines() or [repr(error)]
    logger.warning("wandb: %s; %s", reason[0][:200], what_now)
