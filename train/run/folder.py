"""The folder of a run, where its configuration, checkpoints, metrics and report lie."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

from train import files
from train.config import TOLD, TrainConfig, described

RUNS = Path("runs")

RUN_FILE = "run.json"
"""The run's flags. A folder that holds it is a run's."""
CHECKPOINTS = "checkpoints"
BEST = "best.json"
"""Which checkpoint has the least held-out NLL."""
MODEL = "model"
"""What the weights mean: a Hugging Face folder but for the weights."""
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TENSORBOARD = "tensorboard"
WANDB_RUN = "wandb.json"
"""The run's id at Weights & Biases."""
WANDB = "wandb"
"""What its package writes."""
EVALUATION = "eval.json"
RELIABILITY = "reliability.png"
WRITTEN = (
    *(RUN_FILE, CHECKPOINTS, BEST, MODEL, METRICS, SAMPLES, TENSORBOARD, EVALUATION, RELIABILITY),
    *(WANDB_RUN, WANDB),
)
"""All that a run writes into its folder, and so all that --overwrite removes there."""


def find(config: TrainConfig) -> Path:
    """The folder that `claim` would make or take; touches nothing.

    Raises ValueError if the folder holds something already and neither `resume` nor `overwrite`
    allows it, if there is nothing to resume, or if the run to resume had flags that make another
    run.
    """
    if config.run.resume:
        out = config.run.out or newest()
        before = load(out)
        told = TOLD
        if config.step.rows == before.step.rows:
            told = told | {"batch_size", "accumulate"}
        changed = config.changed_since(before)
        refused = {name: values for name, values in changed.items() if name not in told}
        if refused:
            raise ValueError(
                f"cannot resume {out}: {described(refused)}. Leave these flags out to go on as"
                " before, or start a new run in another --out"
            )
        return out
    out = config.run.out or RUNS / time.strftime("%Y-%m-%d_%H-%M-%S")
    check_place(out)
    contents = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # A run that was killed before it wrote anything else is no loss, nor is half of that file.
    contents -= {RUN_FILE + files.PART}
    if config.run.out and contents - {RUN_FILE}:
        if RUN_FILE not in contents:
            raise ValueError(f"--out {out} is not empty and is not a run: name another folder")
        if not config.run.overwrite:
            raise ValueError(
                f"--out {out} holds a run already: give --resume to go on with it, --overwrite to"
                " remove it, or another --out"
            )
        for file in config.data.files:
            if file.resolve().is_relative_to(out.resolve()):
                raise ValueError(
                    f"--overwrite would remove the run in {out}, and --data {file} lies there:"
                    " move the file, or name another --out"
                )
    return out


def check_place(out: Path) -> None:
    """Raises ValueError where no folder can be, because there is a file."""
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {out}: {path} is a file: name a folder")


def claim(config: TrainConfig, *, step: int = 0) -> Path:
    """Makes the folder of a new run, in place of an old one if told so, and notes the flags there.

    To be called when nothing that can be known before is wrong any more: only then is an old run
    removed, or are the flags of one that goes on replaced. `step` is where that one goes on: what
    it had until then, of flags that change its course, stays on record. Raises what `find` raises.
    """
    out = find(config)
    earlier: list[dict[str, Any]] = []
    if config.run.resume:
        earlier = list(_read(out).get("earlier", ()))
        changed = config.changed_since(load(out))
        if changed:
            earlier.append(
                {"until_step": step, **{name: old for name, (old, _) in changed.items()}}
            )
    else:
        if config.run.out:
            out.mkdir(parents=True, exist_ok=True)
        else:
            out = _make_new(out)
        # But for the old flags, which the new ones replace: killed here, it is still a run.
        for name in set(WRITTEN) - {RUN_FILE}:
            for old in (out / name, out / (name + files.PART)):
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
    values = config.flags() | {
        "data": [str(file.absolute()) for file in config.data.data],
        "eval_data": [str(file.absolute()) for file in config.data.eval_data],
        "out": str(out),
        "resume": False,
        "overwrite": False,
        **dict.fromkeys(("coordinator", "processes", "process")),
    }
    files.write_json(out / RUN_FILE, values | ({"earlier": earlier} if earlier else {}))
    return out


def _make_new(out: Path) -> Path:
    """A folder that was not there before: names are seconds, in which two runs can start."""
    for path in itertools.chain(
        [out], (out.with_name(f"{out.name}-{i}") for i in itertools.count(2))
    ):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def newest() -> Path:
    """The run under `runs/` that started last."""
    runs = [path.parent for path in RUNS.glob(f"*/{RUN_FILE}")]
    if not runs:
        raise ValueError(f"there is no run to resume under {RUNS.absolute()}: name one with --out")
    return max(runs, key=lambda run: (run / RUN_FILE).stat().st_mtime)


def load(out: Path, **changes: Any) -> TrainConfig:
    """The configuration of the run in `out`, but for `changes`; ValueError if there is none."""
    path = out / RUN_FILE
    saved = _read(out)
    saved.pop("earlier", None)
    saved.setdefault("gradient_filter", "auto")  # what it was before there was a flag
    unknown = saved.keys() - TrainConfig().flags().keys()
    if unknown:
        raise ValueError(f"{path} is of another version: it has {', '.join(sorted(unknown))}")
    try:
        return TrainConfig.of(**saved | changes)
    except TypeError as error:
        raise ValueError(
            f"{path} is damaged: a flag has a value of the wrong type ({error})"
        ) from None


def _read(out: Path) -> dict[str, Any]:
    path = out / RUN_FILE
    if not path.is_file():
        raise ValueError(f"there is no run in {out}: {path} is missing")
    try:
        saved = json.loads(path.read_text("utf-8"))
        files = {name: tuple(map(Path, saved[name])) for name in ("data", "eval_data")}
        lists = {name: tuple(saved[name]) for name in saved if isinstance(saved[name], list)}
        return saved | lists | files | {"out": out}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: it does not hold a run's flags ({error!r})") from None
