"""A run to its end, killed on its way, and given to another tool: python -m benchmarks.whole_run.

    python -m benchmarks.whole_run FOLDER --json FILE -- --model gemma3-270m --data a.jsonl …

What stands behind -- is the trainer's. Every command is a process of its own, as a user types it.
The trainer runs twice: without a break, with no compiled programs to begin with, and then killed
(SIGKILL) at a random step behind its first checkpoint and resumed. Both have to end with the same
bits in all weights and moments, and in all losses on the way. The first is exported and loaded by
transformers, whose logits are compared with ours, both float32 on the CPU. At last the run answers
a prompt, and --task asks questions of the model that training began with.

Of a process that trains, `compile_s` is the time to the end of its first step, by its metrics: that
step is in it. It says something only if nothing else runs on the machine.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.measure import report
from benchmarks.measure.runner import current_commit
from train import command_line
from train.run import folder
from train.run import model as run_model
from train.run.checkpoint import said_once, saved_steps
from train.versions import versions

TEXT = (
    "Label smoothing gives a share of the probability to every token of the vocabulary. A model"
    " that was trained with it is less sure of itself: 1, 2, 3 … and, perhaps, more often right."
)
CLOSE = 1e-3
"""Two float32 programs' logits of a few tens differ by less."""
TIMES = ("tokens_per_second", "input_wait")
"""What a step's row holds that no two runs share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeRunFlags(flags.Flags):
    folder: tyro.conf.Positional[Annotated[pathlib.Path, shown("FOLDER")]]
    """A new folder for the runs, the log and what is exported."""
    trainer: tyro.conf.Suppress[tuple[str, ...]] = ()
    command: tyro.conf.Suppress[str] = ""
    prompt: Annotated[str, shown("TEXT")] = "What is the capital of France?"
    """To be answered."""
    task: Annotated[str | None, shown("TASK", "none")] = None
    """What train.evaluate asks the model."""
    task_data: Annotated[pathlib.Path | None, shown("PATH", "the Hugging Face hub")] = None
    """As train.evaluate's, as the next two."""
    limit: Annotated[int | None, shown("N", "all")] = None
    batch_tokens: Annotated[int | None, shown("N", "as train.evaluate's")] = None
    seed: Annotated[int | None, shown("N", "another each time")] = None
    """Decides the step to kill at."""

    def check(self) -> None:
        for name in ("--model", "--data"):
            if name not in self.trainer:
                raise ValueError(f"{name} is missing: the trainer's flags stand behind --")
        super().check()
        flags.check_at_least(1, "--limit", self.limit)
        if given := {"--out", "--resume", "--overwrite"} & {*self.trainer}:
            raise ValueError(f"{min(given)} is not to be given: the runs lie in {self.folder}")
        if self.folder.exists():
            raise ValueError(f"{self.folder} is there already: name a new folder")

    @property
    def model(self) -> str:
        return self.trainer[self.trainer.index("--model") + 1]


@dataclasses.dataclass(frozen=True)
class Process:
    """A command that was run."""

    command: str
    status: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Training:
    """What the rows of one run's metrics say."""

    steps: int
    first_loss: float
    last_loss: float
    compile_s: float
    step_ms: float
    """The median."""
    input_wait: float
    """Share of the time after the first step in which the host waited for a batch."""


@dataclasses.dataclass(frozen=True)
class Killed:
    """The run that was killed, and how it compares with the one that was not."""

    at_step: int
    """The last that it had recorded."""
    resumed_from: int
    compile_s: tuple[float, float]
    """The killed process's, the first to find compiled programs, and that of the one after it."""
    arrays: int
    """In a checkpoint: weights, moments and counters."""
    sha256: tuple[str, str]
    """The checksum of all of them at the end, uninterrupted and killed."""
    different_arrays: list[str]
    different_rows: list[int]
    """Steps of which a loss, a norm, an accuracy or an ECE differs."""


@dataclasses.dataclass(frozen=True)
class Logits:
    """The run's model here beside the exported one in transformers."""

    transformers: str
    tokens: int
    same_tokens: bool
    """Whether the exported tokenizer makes the same ids."""
    largest: float
    """Absolute value of a logit."""
    max_difference: float


@dataclasses.dataclass
class Found:
    command: str
    device: str
    commit: str
    time: str
    versions: dict[str, str | None]
    processes: dict[str, Process] = dataclasses.field(default_factory=dict)
    training: Training | None = None
    killed: Killed | None = None
    logits: Logits | None = None
    answer: str | None = None
    """What was printed."""
    evaluation: dict[str, Any] | None = None
    """Questions, and the measures of each way to score them with their intervals."""
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """What went wrong, by the part that it stopped."""


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("whole_run", parse, make, arguments)


def parse(arguments: Sequence[str] | None = None) -> WholeRunFlags:
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    ours = given[: given.index("--")] if "--" in given else given
    program = "python -m benchmarks.whole_run"
    found = command_line.read(WholeRunFlags, program, ours, description=__doc__)
    command = f"{program} {shlex.join(given)}"
    found = dataclasses.replace(found, trainer=tuple(given[len(ours) + 1 :]), command=command)
    found.check()
    return found


def make(options: WholeRunFlags) -> int:
    ask = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    device = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    jax.config.update("jax_platforms", "cpu")  # here: the device is the commands'
    options.folder.mkdir(parents=True)
    work = Work(options, device)
    parts: dict[str, Callable[[], None]] = {
        "training": work.train,
        "kill": work.kill_and_resume,
        "export": work.export,
        "logits": work.compare_logits,
        "generate": work.generate,
    }
    if options.task:
        parts["evaluate"] = work.evaluate
    found = work.found
    for name, part in parts.items():
        try:
            part()
        except Exception as error:  # the parts that remain may still tell something
            found.failed[name] = f"{type(error).__name__}: {error}"[:500]
        if options.json:
            report.write_json(dataclasses.asdict(found), options.json)
    print(json.dumps(dataclasses.asdict(found), indent=1))
    return 1 if found.failed else 0


class Work:
    """The parts in their order. Each raises where what it shows is not so."""

    def __init__(self, options: WholeRunFlags, device: str) -> None:
        self.options = options
        self.whole, self.killed, self.exported = (
            options.folder / name for name in ("whole", "killed", "exported")
        )
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str((options.folder / "programs").absolute())
        }
        self.environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
        self.found = Found(
            command=options.command,
            device=device,
            commit=options.commit or current_commit(),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions(),
        )

    def train(self) -> None:
        self._run("train", "train", *self.options.trainer, "--out", str(self.whole))
        rows = training_rows(self.whole)
        seconds = [seconds_of(row) for row in rows[1:]]
        waited = sum(row["input_wait"] * s for row, s in zip(rows[1:], seconds, strict=True))
        self.found.training = Training(
            steps=len(rows),
            first_loss=rows[0]["loss"],
            last_loss=rows[-1]["loss"],
            compile_s=seconds_of(rows[0]),
            step_ms=1e3 * statistics.median(seconds),
            input_wait=waited / sum(seconds),
        )

    def kill_and_resume(self) -> None:
        steps, every = len(training_rows(self.whole)), folder.load(self.whole).run.checkpoint_every
        step = random.Random(self.options.seed).randrange(every + 1, steps)
        arguments = [*self.options.trainer, "--out", str(self.killed)]
        self._run("killed", "train", *arguments, kill=lambda: recorded(self.killed) >= step)
        reached = training_rows(self.killed)
        saved = max(saved_steps(self.killed))
        self._run("resumed", "train", "--resume", "--out", str(self.killed))
        rows, expected = training_rows(self.killed), training_rows(self.whole)
        arrays, wanted = digests(self.killed), digests(self.whole)
        self.found.killed = Killed(
            at_step=len(reached),
            resumed_from=saved,
            compile_s=(seconds_of(reached[0]), seconds_of(rows[saved])),
            arrays=len(wanted),
            sha256=(together(wanted), together(arrays)),
            different_arrays=different(wanted, arrays),
            different_rows=different(by_step(expected), by_step(rows)),
        )
        if self.found.killed.different_arrays or self.found.killed.different_rows:
            raise AssertionError("the resumed run is not the one that was not killed")

    def export(self) -> None:
        # Float32, as the weights are trained: nothing is rounded.
        flags = "--dtype", "float32"
        self._run("export", "train.export", str(self.whole), str(self.exported), *flags)

    def compare_logits(self) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        loaded = run_model.read(str(self.whole))
        ids = loaded.tokenizer.encode_text(TEXT)
        tokens = jnp.asarray([ids])
        hidden = loaded.model(tokens, jnp.ones_like(tokens), jnp.arange(len(ids))[None])
        ours = np.asarray(hidden[0] @ loaded.model.head.T)
        if cap := loaded.shape.final_softcap:
            ours = cap * np.tanh(ours / cap)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.exported, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.exported)
        self.found.logits = Logits(
            transformers=transformers.__version__,
            tokens=len(ids),
            same_tokens=tokenizer(TEXT).input_ids == list(ids),
            largest=float(np.abs(theirs).max()),
            max_difference=float(np.abs(ours - theirs).max()),
        )
        if not self.found.logits.max_difference < CLOSE:
            raise AssertionError("transformers has other logits")

    def generate(self) -> None:
        arguments = str(self.whole), "--prompt", self.options.prompt, "--max-tokens", "64"
        self.found.answer = self._run("generate", "train.generate", *arguments).strip()

    def evaluate(self) -> None:
        out = self.options.folder / "evaluation"
        task = str(self.options.task)
        arguments = ["--model", self.options.model, "--task", task, "--out", str(out)]
        for name in ("task_data", "limit", "batch_tokens"):
            if (value := getattr(self.options, name)) is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        self._run("evaluate", "train.evaluate", *arguments)
        (result,) = json.loads((out / "result.json").read_text())["tasks"].values()
        self.found.evaluation = {
            "questions": result["questions"],
            "shots": result["shots"],
            "scorings": {name: it["measures"] for name, it in result["scorings"].items()},
        }

    def _run(
        self, name: str, module: str, *arguments: str, kill: Callable[[], bool] | None = None
    ) -> str:
        """What the command printed; RuntimeError where its status is another than it should be."""
        command = ["python", "-m", module, *arguments]
        log = self.options.folder / "log.txt"
        begun = time.perf_counter()
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                [sys.executable, *command[1:]], env=self.environment, stdout=file, stderr=file
            )
            while kill and process.poll() is None:
                if kill():
                    process.kill()
                time.sleep(0.005)
            status = process.wait()
            seconds = time.perf_counter() - begun
            file.write(f"[status {status}, {seconds:.1f} s]\n\n".encode())
        self.found.processes[name] = Process(shlex.join(command), status, round(seconds, 2))
        printed = log.read_bytes()[start:].decode().rpartition("[status ")[0]
        if status != (-signal.SIGKILL if kill else 0):
            raise RuntimeError(f"{name} ended with status {status}: …{printed[-300:]}")
        return printed


def training_rows(out: pathlib.Path) -> list[dict[str, Any]]:
    """A row for each step of the run, whole ones alone."""
    lines = (out / folder.METRICS).read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def recorded(out: pathlib.Path) -> int:
    """Rows that the run has written so far."""
    metrics = out / folder.METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def seconds_of(row: dict[str, Any]) -> float:
    return row["tokens"] / row["tokens_per_second"]


def by_step(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What each step measured, but for the time it took."""
    return {row["step"]: {k: v for k, v in row.items() if k not in TIMES} for row in rows}


def different[K: (int, str)](one: dict[K, Any], other: dict[K, Any]) -> list[K]:
    """The names that only one has, or that stand for something else in the other."""
    names = one.keys() | other.keys()
    return [name for name in sorted(names) if one.get(name) != other.get(name)]


def digests(out: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each array in the newest checkpoint, by its path, whatever device it was on."""
    path = (out / folder.CHECKPOINTS / str(max(saved_steps(out))) / "state").absolute()
    with said_once(), ocp.PyTreeCheckpointer() as reader:
        like = reader.metadata(path).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
    return {
        jax.tree_util.keystr(name): hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
        for name, array in jax.tree_util.tree_leaves_with_path(state)
    }


def together(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
