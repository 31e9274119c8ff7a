"""The flags of a run: its loss, its steps, its optimizer, its length and its folder."""

from __future__ import annotations

import dataclasses
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from train.flags import (
    flag,
    require,
    require_count,
    require_not_negative,
    require_positive,
    require_share,
    shown,
)
from train.models.config import ADAPTED, Lora

DEFAULT_STEPS = 250


FILTERS = ("fp8", "auto", "hidden", "none")
"""What --gradient-filter names; a number is one too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is minimised."""

    label_smoothing: Annotated[float, shown("BETA")] = 0.1
    """Probability β that the training target spreads evenly over the whole vocabulary."""
    smooth_known_tokens: bool = False
    """Where the head has more rows than the tokenizer has tokens, as Qwen's, leave the spare rows
    out of the loss: probability, and β, is spread over the tokens. They get no gradient."""
    z_loss: Annotated[float, shown("LAMBDA")] = 0.0
    """Weight of the penalty λ·lse², which keeps the logits near 0."""
    softcap: Annotated[float | None, shown("CAP", "off")] = None
    """Bound logits to ±CAP by CAP·tanh(z/CAP)."""
    temperature: Annotated[float, shown("T")] = 1.0
    """Divide logits by T in training's loss, before a softcap. Evaluations and answers have them as
    they are."""
    reduction: Literal["mean", "sum"] = "mean"
    """Minimise the loss per response token, or its sum over the step; clipping tells them apart."""
    implementation: Annotated[str, shown("NAME")] = "auto"
    """Backend of the loss: auto, reference, chunked, or a kernel's name."""
    gradient_filter: Annotated[str, shown("{fp8,auto,hidden,none,EPSILON}")] = "fp8"
    """What kernels may leave out of the loss's gradient: fp8 and none nothing; auto what is small,
    with which a loss ends a little higher; hidden that of the hidden states' gradient; a number
    probabilities below it: above auto's own, 5e-5 for 8,192 tokens of 256,000 classes and 4e-4 for
    SmolLM2's 49,152, faster than auto, and the loss ends higher still."""

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing <= 1,
            f"--label-smoothing must be in [0, 1], not {self.label_smoothing}",
        )
        require(
            self.gradient_filter in FILTERS or 0 < _number(self.gradient_filter) < 1,
            f"--gradient-filter must be one of {', '.join(FILTERS)} or a number above 0 and below"
            f" 1, not {self.gradient_filter!r}",
        )
        if self.gradient_filter not in FILTERS:  # however it is written
            object.__setattr__(self, "gradient_filter", repr(float(self.gradient_filter)))
        require_not_negative("z_loss", self.z_loss)
        require_positive("softcap", self.softcap)
        require_positive("temperature", self.temperature)

    @property
    def left_out(self) -> float | str | None:
        """`gradient_filter` as `lsce` takes it."""
        if self.gradient_filter in FILTERS:
            return None if self.gradient_filter == "none" else self.gradient_filter
        return float(self.gradient_filter)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class MeshShape(NamedTuple):
    """How many devices do what: `train.mesh` says it."""

    data: int = 1
    fsdp: int = 1

    @classmethod
    def read(cls, text: str) -> Self:
        """From "data=2,fsdp=4"; an axis that is not named has size 1. ValueError for another."""
        sizes = [part.partition("=") for part in text.split(",")]
        names = [name for name, _, _ in sizes]
        require(
            all(size.isascii() and size.isdecimal() and int(size) for _, _, size in sizes)
            and set(names) <= set(cls._fields)
            and len(set(names)) == len(names),
            f"--mesh {text}: must be like data=2,fsdp=4: each axis once, with a size of at least 1",
        )
        return cls(**{name: int(size) for name, _, size in sizes})

    @property
    def size(self) -> int:
        """Devices."""
        return math.prod(self)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self._asdict().items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is computed."""

    batch_size: Annotated[int, shown("ROWS")] = 4
    """Rows that are in memory at a time."""
    accumulate: Annotated[int, shown("K")] = 1
    """Batches whose gradients make one step, the same as one batch K times as large."""
    mesh: Annotated[str, shown("data=D,fsdp=F")] = "data=1,fsdp=1"
    """D·F devices share these rows: of this machine, or with --coordinator all that there are. F of
    them share each weight and its moments, and gather a layer when it is computed; D repeat that.
    Neighbours among F are of one machine where F divides what each has."""
    autotune: bool = False
    """Let XLA time a GPU's programs and choose. Runs then differ in their last bits, for a step
    of SmolLM2 135M that on an H200 took 1% less time."""
    memory: Annotated[float | None, shown("GB", "as the flags say")] = None
    """What a step may take of a device, in 10⁹ bytes: chooses --remat, and divides --batch-size
    over more --accumulate, by compiling one way after the other until one fits."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate"):
            require_count(name, getattr(self, name))
        require_positive("memory", self.memory)
        require(
            self.batch_size % self.mesh_shape.size == 0,
            f"--batch-size {self.batch_size} must be a multiple of the {self.mesh_shape.size}"
            f" devices of --mesh {self.mesh}",
        )

    @property
    def mesh_shape(self) -> MeshShape:
        return MeshShape.read(self.mesh)

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.accumulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
    """The processes that train together, one on each machine or one for each device."""

    coordinator: Annotated[str | None, shown("HOST:PORT", "this process trains alone")] = None
    """Where process 0 listens to the others, or auto, as Slurm or Open MPI say it, where JAX gives
    each process one GPU. All get the same other flags and data, and an --out that all see; the
    first writes and reports."""
    processes: Annotated[int | None, shown("N", "as auto finds out")] = None
    """How many there are."""
    process: Annotated[int | None, shown("I", "as auto finds out")] = None
    """Which this is, from 0 on."""

    def __post_init__(self) -> None:
        given = self.processes is not None, self.process is not None
        if self.coordinator is None or self.coordinator == "auto":
            of = "--coordinator auto" if self.coordinator else "no --coordinator"
            require(not any(given), f"--processes and --process have no meaning with {of}")
            return
        host, _, port = self.coordinator.rpartition(":")
        require(
            bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16,
            f"--coordinator {self.coordinator} must be auto or like node0:9876",
        )
        require(all(given), f"--coordinator {self.coordinator} needs --processes and --process")
        require_count("processes", self.processes)
        require(
            0 <= (self.process or 0) < (self.processes or 0),
            f"--process must be in [0, {self.processes}), not {self.process}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedOptions:
    """Which weights are trained."""

    freeze: Annotated[tuple[str, ...], shown("PATTERN ...", "none")] = ()
    """Weights that stay as they are, by name or by the first parts of it: embedding, blocks.mlp,
    "blocks.*.bias". They take no gradients and no moments. The layers of a kind are one weight."""
    lora_rank: Annotated[int | None, shown("R", "off")] = None
    """Train low-rank adapters of this rank alone: A [D, R] and B [R, F] beside each matrix, which
    stays as it is. Checkpoints hold all weights; generate, evaluate and export merge them."""
    lora_alpha: Annotated[float, shown("A")] = 32.0
    """What adapters add is multiplied by A / R."""
    lora_dropout: Annotated[float, shown("P")] = 0.0
    """Probability of dropping a feature of what an adapter reads; the matrix beside it reads all,
    and evaluations drop nothing. Another than --dropout, which adapters seldom need."""
    lora_targets: Annotated[tuple[str, ...], shown("PATTERN ...")] = ("attention.*", "mlp.*")
    """What has adapters: attention.query, .key, .value and .out, mlp.gate, .up and .down, head."""

    def __post_init__(self) -> None:
        require_count("lora_rank", self.lora_rank)
        require_positive("lora_alpha", self.lora_alpha)
        require_share("lora_dropout", self.lora_dropout)
        require(bool(self.lora_targets), "--lora-targets names nothing that adapters could be on")
        for pattern in self.lora_targets:
            require(
                any(fnmatchcase(name, pattern) for name in ADAPTED),
                f"--lora-targets {pattern} is none of {', '.join(ADAPTED)}, nor a pattern of them",
            )
        for field in dataclasses.fields(self):
            require(
                self.lora_rank is not None
                or not field.name.startswith("lora_")
                or getattr(self, field.name) == field.default,
                f"{flag(field.name)} is of adapters: give --lora-rank too",
            )

    @property
    def lora(self) -> Lora | None:
        """The adapters, if any."""
        if self.lora_rank is None:
            return None
        targets = (n for n in ADAPTED if any(fnmatchcase(n, p) for p in self.lora_targets))
        return Lora(self.lora_rank, self.lora_alpha, tuple(targets), self.lora_dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW and its learning rate."""

    learning_rate: Annotated[float, shown("RATE")] = 3e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """What the learning rate does after warm-up."""
    warmup_steps: Annotated[int | None, shown("N", "a tenth of all steps")] = None
    """Steps in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, shown("RATE")] = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: Annotated[float, shown("B")] = 0.9
    """Decay of the mean of the gradients."""
    beta2: Annotated[float, shown("B")] = 0.95
    """Decay of the mean of their squares."""
    clip_norm: Annotated[float | None, shown("NORM")] = 1.0
    """Longest gradient, all that is trained together; None leaves gradients as they are."""

    def __post_init__(self) -> None:
        require_positive("learning_rate", self.learning_rate)
        require_positive("clip_norm", self.clip_norm)
        require_not_negative("weight_decay", self.weight_decay)
        require_share("beta1", self.beta1)
        require_share("beta2", self.beta2)
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"--warmup-steps must be at least 0, not {self.warmup_steps}",
        )

    def steps_of_warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`; ValueError if there are not so many."""
        steps = total_steps // 10 if self.warmup_steps is None else self.warmup_steps
        require(
            steps <= total_steps, f"--warmup-steps {steps} is more than all {total_steps} steps"
        )
        return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long it goes on, and what it leaves in which folder."""

    steps: Annotated[int | None, shown("N", f"{DEFAULT_STEPS}, or as --epochs says")] = None
    """Optimizer steps."""
    epochs: Annotated[float | None, shown("X", "as --steps says")] = None
    """Times to see all training rows, at least, instead of --steps."""
    seed: int = 0
    """Decides weights, dropout, order of the data, and questions."""
    out: Annotated[Path | None, shown("FOLDER", "a new folder under runs/")] = None
    """The run's folder: new or empty, unless --resume or --overwrite is given."""
    resume: bool = False
    """Go on with the run in --out, or the newest under runs/. Flags not given are as they were."""
    overwrite: bool = False
    """Remove what the run in --out wrote there first."""
    eval_every: Annotated[int | None, shown("STEPS", "at the end only")] = None
    """Evaluate on the held-out records during training too, and save what is best so far."""
    samples: Annotated[int | None, shown("N", "2 with --eval-every and a model of others")] = None
    """Held-out prompts that the model answers at each evaluation, shown and kept in
    samples.jsonl."""
    checkpoint_every: Annotated[int, shown("STEPS")] = 100
    """Steps from one checkpoint to the next; there is always one at the end."""
    keep: Annotated[int, shown("N")] = 2
    """Newest checkpoints to keep, besides the one with the least held-out NLL."""
    log_every: Annotated[int, shown("STEPS")] = 1
    """Steps from one row of metrics.jsonl to the next."""
    wandb: Annotated[str | None, shown("PROJECT", "off")] = None
    """Copy what is measured to this project at Weights & Biases."""

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "checkpoint_every", "keep", "log_every"):
            require_count(name, getattr(self, name))
        require(
            self.samples is None or self.samples >= 0,
            f"--samples must be at least 0, not {self.samples}",
        )
        require(self.wandb != "", "--wandb needs the name of a project")
        require_positive("epochs", self.epochs)
        require(0 <= self.seed < 2**32, f"{flag('seed')} must be in [0, 2**32), not {self.seed}")
        require(
            self.steps is None or self.epochs is None,
            f"--steps {self.steps} and --epochs {self.epochs} contradict each other: give one",
        )
        require(
            not (self.resume and self.overwrite),
            "--resume and --overwrite contradict each other: go on with the run, or remove it",
        )
