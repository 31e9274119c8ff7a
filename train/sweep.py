"""`python -m train.sweep`: a run for every combination of the flags' values, then a comparison.

Each run is a `python -m train` of its own, in a folder named after what is varied. A crash costs
that run only; the same command again skips the runs that are done and resumes those that are not.
"""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m train.sweep")  # the imports below take a second

import concurrent.futures
import dataclasses
import difflib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from train import command_line, files
from train.config import FLAT, FREE, TrainConfig
from train.evaluation import comparison
from train.flags import flag
from train.run import folder as run_folder
from train.run.options import HostOptions, RunOptions
from train.run.progress import Console

TRAIN = (sys.executable, "-m", "train")
SWEEP = "sweep.json"
PICTURE = "sweep.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRunOptions(RunOptions):
    """How long each run goes on, and what the sweep leaves in which folder."""

    out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help="The sweep's folder.",
            help_behavior_hint="(default: runs/sweep)",
        ),
    ] = Path("runs/sweep")
    resume: Annotated[bool, tyro.conf.Suppress] = False
    overwrite: Annotated[bool, tyro.conf.Suppress] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """Train once for every combination of the given values, and compare accuracy and calibration.

    Any flag takes several values: --label-smoothing 0 0.1 --learning-rate 1e-3 3e-3 makes four
    runs. Only the files of --data, and of --eval-data, go together to every run; --autotune takes
    true and false.

    Each run has its folder in --out, next to the comparison: sweep.json and sweep.png. The same
    command again skips finished runs and goes on with unfinished ones.
    """

    run: SweepRunOptions = dataclasses.field(default_factory=SweepRunOptions)
    hosts: Annotated[HostOptions, tyro.conf.Suppress] = dataclasses.field(
        default_factory=HostOptions
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the grid."""

    settings: dict[str, Any]
    """What this run has for each field that the sweep varies."""
    config: SweepConfig
    """`out` is the run's own folder."""
    arguments: tuple[str, ...]
    """The flags that make `python -m train` this run, --out and --resume apart."""

    @property
    def name(self) -> str:
        """`label_smoothing=0.1,learning_rate=0.003`."""
        return run_name(self.settings)

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out or "")

    @property
    def evaluation(self) -> Path:
        """The file that the run writes last."""
        return self.folder / run_folder.EVALUATION


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the grid; returns 0, 1 if a run failed, 2 for a user's mistake, 128 + n for signal n."""
    try:
        jobs = in_one_dtype(grid(sys.argv[1:] if arguments is None else arguments))
        check_folders(jobs)
        load(jobs)
        check_runs([job.config for job in jobs if not job.evaluation.is_file()])
        jobs[0].folder.parent.mkdir(parents=True, exist_ok=True)
        save(jobs, {})  # which makes the folder a sweep's
    except (ValueError, OSError) as error:
        print(f"python -m train.sweep: {command_line.said(error)}", file=sys.stderr)
        return 2
    console = Console()
    failed: dict[str, str] = {}
    for number, job in enumerate(jobs, start=1):
        done = job.evaluation.is_file()
        console.rule(f"{number}/{len(jobs)}  {job.name}" + ("  (already done)" if done else ""))
        if not done:
            status, signum = run(job)
            if signum:
                print(f"{signal.Signals(signum).name}: the same command goes on", file=sys.stderr)
                return 128 + signum
            if status:
                failed[job.name] = f"exit status {status}"
        save(jobs, failed)
    results = load(jobs)
    if results:
        comparison.print_table(results, console)
        missing = f", without the {len(failed)} that failed" if failed else ""
        picture = jobs[0].folder.parent / PICTURE
        console.print(f"comparison: {picture}{missing}", highlight=False, soft_wrap=True)
    for name, reason in failed.items():
        print(f"python -m train.sweep: {name} failed ({reason})", file=sys.stderr)
    return 1 if failed else 0


def grid(arguments: Sequence[str]) -> list[Job]:
    """The runs that a command line asks for, every one of them checked.

    Raises:
      ValueError: in one line, for wrong flags, no field with several values, or twin runs.
      SystemExit: after printing help.
    """
    if {"-h", "--help"} & set(arguments):
        read(["--help"])
    choices = alternatives(arguments)
    varied = [field for field, options in choices.items() if len(options) > 1]
    if not varied:
        raise ValueError(
            "nothing to compare: give a flag several values, as in --label-smoothing 0 0.1"
        )
    jobs: dict[str, Job] = {}
    for combination in itertools.product(*choices.values()):
        flags = dict(zip(choices, combination, strict=True))
        _, model = flags.get("model", ("", SweepConfig().model.model))
        config = read([part for option in flags.values() for part in option], model)
        if not config.data.held_out and not config.data.eval_data:
            raise ValueError(
                "--held-out 0 leaves nothing to compare: runs are scored on held-out records"
            )
        settings = {field: config.flags()[field] for field in varied}
        name = run_name(settings)
        if name in jobs:
            raise ValueError(f"the same run is asked for twice: {name}")
        flags.pop("out", None)
        jobs[name] = Job(
            settings,
            config.replace(out=Path(config.run.out or "") / name),
            tuple(part for option in flags.values() for part in option),
        )
    return list(jobs.values())


def run_name(settings: dict[str, Any]) -> str:
    pairs = (f"{field}={comparison.text(value)}" for field, value in settings.items())
    return ",".join(pairs).replace(os.sep, "_")


def alternatives(arguments: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """For each field given, the flags that it may be set by: one for each of its values.

    >>> alternatives(["--label-smoothing", "0", "0.1", "--steps", "20"])
    {'label_smoothing': [('--label-smoothing', '0'), ('--label-smoothing', '0.1')],
     'steps': [('--steps', '20')]}
    """
    fields = {
        flag(name): (name, default)
        for name, default in SweepConfig().flags().items()
        if name not in ("resume", "overwrite")
    }
    values: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            if name in ("--resume", "--overwrite"):
                raise ValueError(f"{name} is for single runs: a sweep always resumes, see --help")
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1, cutoff=0.75)
                hint = f": did you mean {near[0]}?" if near else ", see --help"
                raise ValueError(f"there is no flag {name}{hint}")
            if name in values:
                raise ValueError(f"{name} is given twice: put its values behind one {name}")
            values[name] = [value] if equals else []
        elif values:
            values[next(reversed(values))].append(argument)
        else:
            raise ValueError(f"{argument!r} stands behind no flag, see --help")

    found: dict[str, list[tuple[str, ...]]] = {}
    for name, given in values.items():
        field, default = fields[name]
        if isinstance(default, bool):
            found[field] = [switch(name, value) for value in given or ["true"]]
        elif isinstance(default, tuple):
            found[field] = [(name, *given)]
        elif given:
            found[field] = [(name, value) for value in given]
        else:
            raise ValueError(f"{name} needs a value, or several")
    if len(found.get("out", [])) > 1:
        raise ValueError("--out takes one folder, in which each run has its own")
    return found


def switch(name: str, value: str) -> tuple[str, ...]:
    """A flag without a value, there or not."""
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{name} takes true and false, not {value!r}")
    return (name,) if value.lower() == "true" else ()


def read(arguments: Sequence[str], model: str = SweepConfig().model.model) -> SweepConfig:
    """The configuration of one run of that model."""
    return command_line.read(
        SweepConfig,
        "python -m train.sweep",
        arguments,
        default=SweepConfig.defaults(model),
        config=(*FLAT, tyro.conf.FlagCreatePairsOff),
    )


def in_one_dtype(jobs: Sequence[Job]) -> list[Job]:
    """The runs, with --dtype auto for what those that were begun have: another chip may have
    computed them, and what auto is here would not compare with it.

    Raises:
      ValueError: if those have several.
    """
    begun = [job for job in jobs if (job.folder / run_folder.RUN_FILE).is_file()]
    dtypes = {
        run_folder.load(job.folder).model.dtype for job in begun if job.config.model.dtype == "auto"
    }
    if not dtypes:
        return list(jobs)
    if len(dtypes) > 1:
        raise ValueError(
            f"the runs of {jobs[0].folder.parent} have --dtype {' and '.join(sorted(dtypes))}: name"
            " one of them, and another --out"
        )
    (dtype,) = dtypes
    return [
        dataclasses.replace(
            job,
            config=job.config.replace(dtype=dtype),
            arguments=(*job.arguments, "--dtype", dtype),
        )
        if job.config.model.dtype == "auto" and "dtype" not in job.settings
        else job
        for job in jobs
    ]


def check_folders(jobs: Sequence[Job]) -> None:
    """Raises ValueError if the sweep's folder is something else's, or holds other runs so named."""
    out = jobs[0].folder.parent
    run_folder.check_place(out)
    contents = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if SWEEP not in contents and contents - {job.name for job in jobs}:
        raise ValueError(f"--out {out} is not empty and is not a sweep's: name another folder")
    for job in jobs:
        check_folder(job)


def check_folder(job: Job) -> None:
    """Raises ValueError if another sweep left a run of the same name with other settings."""
    if not (job.folder / run_folder.RUN_FILE).is_file():
        return
    wanted = job.config.flags()
    for name, before in run_folder.load(job.folder).flags().items():
        now = wanted[name]
        if name in ("data", "eval_data"):
            before, now = ([str(file.absolute()) for file in files] for files in (before, now))
        of_the_model = name == "softcap" and now is None  # not given: the run notes the model's own
        if name not in FREE and before != now and not of_the_model:
            raise ValueError(
                f"{job.folder} holds a run with {flag(name)} {before}, not {now}:"
                " name another --out for this sweep"
            )


def check_runs(configs: Sequence[SweepConfig]) -> None:
    """Raises ValueError for what would stop one of the runs after others have taken their hours.

    In a process of its own: one that has looked for a GPU keeps the GPU's memory.
    """
    if configs:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
            process.submit(_check_runs, configs).result()


def _check_runs(configs: Sequence[SweepConfig]) -> None:
    from train.data import files as data_files
    from train.run.model import choose
    from train.run.prepare import check

    for config in configs:
        check(config, choose(config, None).shape)
    for path in configs[0].data.files:
        data_files.read(path, [] if configs[0].data.skip_bad_records else None)


def run(job: Job) -> tuple[int, int | None]:
    """Runs `python -m train` to its end.

    Returns its exit status, and the signal that asked this process to stop meanwhile. The signal is
    passed on once, so that the run can save its state: hence a process group of its own, which
    Ctrl-C at the terminal does not reach.
    """
    command = [*TRAIN, *job.arguments, "--out", str(job.folder)]
    if (job.folder / run_folder.RUN_FILE).is_file():
        command.append("--resume")
    stopped_by: int | None = None

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = signum
        child.send_signal(signum)

    with subprocess.Popen(command, process_group=0) as child:
        before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = child.wait()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
    return status, stopped_by


def load(jobs: Sequence[Job]) -> list[comparison.Result]:
    """The results of the finished runs; ValueError names a file that is none."""
    results = []
    for job in jobs:
        if job.evaluation.is_file():
            try:
                evaluation = json.loads(job.evaluation.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"{job.evaluation} is damaged ({error}): remove it") from None
            results.append(comparison.Result(job.name, job.settings, evaluation))
    return results


def save(jobs: Sequence[Job], failed: dict[str, str]) -> None:
    """Writes the comparison of the runs so far: sweep.json, and sweep.png if any is finished."""
    out = jobs[0].folder.parent
    results = load(jobs)
    by_name = {result.name: result.evaluation for result in results}
    runs = [
        {
            "name": job.name,
            "settings": job.settings,
            "status": "done" if job.name in by_name else "failed" if job.name in failed else "due",
            "tokens": by_name.get(job.name, {}).get("tokens"),
            "choices": by_name.get(job.name, {}).get("choices"),
        }
        for job in jobs
    ]
    files.write_json(out / SWEEP, {"format": 1, "runs": runs})
    if results:
        comparison.save(results, out / PICTURE)


if __name__ == "__main__":
    sys.exit(start.run(main))
