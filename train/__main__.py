"""`python -m train`: from flags to a run, and from what stops a run to an exit status."""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m train")  # the imports below take a second

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from train import command_line
from train.config import FLAT, TrainConfig
from train.run import folder as run_folder

LISTS = dict.fromkeys(("--data", "--eval-data"), "file")
LISTS |= dict.fromkeys(("--freeze", "--lora-targets"), "pattern")
"""Flags with several values, and what these are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trainer.

    Returns 0, 1 after a NaN or where a file could not be written, 2 for a user's mistake, 128 + n
    for signal n.
    """
    try:
        config = parse(arguments)
        # Seconds of imports that --help and a wrong flag need not wait for.
        from train import hosts

        hosts.join(config.hosts)
    except (ValueError, OSError) as error:
        return _stop(2, error)
    try:
        return _train(config)
    except Exception:
        if hosts.count() == 1:
            raise
        traceback.print_exc()
        return hosts.leave(1)


def _train(config: TrainConfig) -> int:
    from train import hosts
    from train.run import loop
    from train.run.prepare import prepare

    try:
        with hosts.together():
            prepared = prepare(config)
    except (ValueError, OSError) as error:
        return hosts.leave(_stop(2, error))
    try:
        with hosts.together():
            loop.train(prepared)
    except loop.Interrupted as interrupted:
        return _stop(128 + interrupted.signum, interrupted)
    except loop.NotFiniteError as error:
        return _stop(1, error)
    except OSError as error:
        return hosts.leave(_stop(1, error))
    return 0


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for.

    With --resume, flags that are not given are those of the run that goes on.

    Raises:
      SystemExit: after --help.
      ValueError: for flags that cannot be read, if there is no run to resume, or for a --data
        without files or given twice.
    """

    def read(default: TrainConfig, **options: Any) -> TrainConfig:
        return command_line.read(
            TrainConfig, "python -m train", arguments, default=default, **options
        )

    given = _given(sys.argv[1:] if arguments is None else arguments)
    if not given.resume or given.help or given.overwrite:
        return read(
            TrainConfig.defaults(
                given.model or TrainConfig().model.model, lora=given.lora_rank is not None
            ),
            config=(*FLAT, tyro.conf.FlagCreatePairsOff),
        )
    # Either takes the place of the other.
    changes: dict[str, Any] = {}
    if given.epochs and not given.steps:
        changes["steps"] = None
    if given.steps and not given.epochs:
        changes["epochs"] = None
    return read(run_folder.load(given.out or run_folder.newest(), **changes), config=FLAT)


def _given(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags that say where the other flags' defaults come from; tyro reads and checks all.

    But for lists of which there are none, as after a pattern that matches no file: tyro would take
    that for no flag at all, and of two flags it would take the last.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("-h", "--help", action="store_true")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--overwrite", action="store_true")
    first.add_argument("--out", type=Path, nargs="?")
    first.add_argument("--model", nargs="?")
    first.add_argument("--lora-rank", nargs="?")
    for name in LISTS:
        first.add_argument(name, nargs="*", action="append", default=[])
    for name in ("--steps", "--epochs"):
        first.add_argument(name, nargs="*")
    try:
        given = first.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name} takes no value: {error.message}") from None
    for name, what in LISTS.items():
        lists = getattr(given, name.removeprefix("--").replace("-", "_"))
        if [] in lists:
            raise ValueError(f"{name} needs a {what}, or several")
        if len(lists) > 1:
            raise ValueError(f"{name} is given twice: put all {what}s behind one {name}")
    return given


def _stop(status: int, error: Exception) -> int:
    print(f"python -m train: {command_line.said(error)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(start.run(main))
