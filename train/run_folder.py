"""The folder of a run, where its configuration, checkpoints, metrics and report lie."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from train.config import TrainConfig

RUNS = Path("runs")
RUN_FILE = "run.json"
"""The run's configuration. A folder that holds it is a run's."""


def claim(config: TrainConfig) -> Path:
    """Makes the folder of a new run, or checks that of a run that goes on.

    Raises ValueError if the folder holds something already and neither `resume` nor `overwrite`
    allows it, if there is nothing to resume, or if the run to resume had other flags.
    """
    if config.resume:
        out = config.out or newest()
        changed = config.changed_since(load(out))
        if changed:
            raise ValueError(
                f"cannot resume {out}: {'; '.join(changed)}. Leave these flags out to go on as"
                " before, or start a new run in another --out"
            )
        _save(config, out)
        return out

    out = config.out or RUNS / time.strftime("%Y-%m-%d_%H-%M-%S")
    contents = {path.name for path in out.iterdir()} if out.is_dir() else set()
    is_run = RUN_FILE in contents
    # A run that was killed before it wrote anything else is no loss.
    if contents - {RUN_FILE}:
        if not is_run:
            raise ValueError(f"--out {out} is not empty and is not a run: name another folder")
        if not config.overwrite:
            raise ValueError(
                f"--out {out} holds a run already: give --resume to go on with it, --overwrite to"
                " remove it, or another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    _save(config, out)
    return out


def newest() -> Path:
    """The run under `runs/` that started last."""
    runs = [path.parent for path in RUNS.glob(f"*/{RUN_FILE}")]
    if not runs:
        raise ValueError(f"there is no run to resume under {RUNS.absolute()}: name one with --out")
    return max(runs, key=lambda run: (run / RUN_FILE).stat().st_mtime)


def load(out: Path, **changes: Any) -> TrainConfig:
    """The configuration of the run in `out`, but for `changes`; ValueError if there is none."""
    path = out / RUN_FILE
    if not path.is_file():
        raise ValueError(f"there is no run in {out}: {path} is missing")
    saved = json.loads(path.read_text())
    unknown = saved.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise ValueError(f"{path} is of another version: it has {', '.join(sorted(unknown))}")
    saved |= {"data": tuple(map(Path, saved["data"])), "out": out}
    return TrainConfig(**saved | changes)


def _save(config: TrainConfig, out: Path) -> None:
    values = dataclasses.asdict(config) | {
        "data": [str(file.absolute()) for file in config.data],
        "out": str(out),
        "resume": False,
        "overwrite": False,
    }
    whole = out / (RUN_FILE + ".tmp")
    whole.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(whole, out / RUN_FILE)
