"""`python -m train`: from flags to a run, and from what stops a run to an exit status."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from train import run_folder
from train.config import TrainConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trainer; returns 0, 1 after a NaN, 2 for a user's mistake, 128 + n for signal n."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        config = parse(arguments)
        from train import loop  # seconds of imports that --help and a wrong flag need not wait for

        prepared = loop.prepare(config)
    except (ValueError, OSError) as error:
        return _stop(2, error)
    except KeyboardInterrupt:
        return _stop(128 + signal.SIGINT, "SIGINT: stopped before the first step")
    try:
        loop.train(prepared)
    except loop.Interrupted as interrupted:
        return _stop(128 + interrupted.signum, interrupted)
    except loop.NotFiniteError as error:
        return _stop(1, error)
    return 0


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for.

    With --resume, flags that are not given are those of the run that goes on.

    Raises:
      SystemExit: for --help and for flags that cannot be read, after printing.
      ValueError: if there is no run to resume.
    """

    def read(default: TrainConfig, **options: Any) -> TrainConfig:
        return tyro.cli(
            TrainConfig, prog="python -m train", args=arguments, default=default, **options
        )

    config = read(TrainConfig(), config=(tyro.conf.FlagCreatePairsOff,))
    if not config.resume:
        return config
    out = config.out or run_folder.newest()
    moved = {"data": config.data} if config.data else {}
    return read(run_folder.load(out, **moved))


def _stop(status: int, message: object) -> int:
    print(f"python -m train: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
