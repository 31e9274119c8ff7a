"""All that a run can be told: one frozen dataclass, the only source of flags, defaults and help."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.data.encode import MIN_LENGTH
from train.models.config import PRESETS
from train.text.bpe import MIN_VOCAB_SIZE

DEFAULT_STEPS = 250


def _shown(metavar: str, default: str | None = None) -> Any:
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a language model with label smoothing, and measure how calibrated it is.

    With no flags at all, a small model learns question and answer pairs from Python's own
    documentation in a few minutes on a CPU. The run's folder then holds metrics.jsonl, eval.json,
    reliability.png, TensorBoard events and checkpoints.
    """

    data: Annotated[tuple[Path, ...], _shown("FILE ...", "Python's own documentation")] = ()
    """JSON lines, a JSON array (both may be .gz) or Parquet: chat, alpaca, ShareGPT, prompt and
    completion, or plain text."""
    skip_bad_records: bool = False
    """Leave out the records that cannot be read, and say which and why."""
    held_out: Annotated[float, _shown("SHARE")] = 0.1
    """Share of the records kept out of training and evaluated on."""
    max_length: Annotated[int, _shown("TOKENS")] = 256
    """Tokens in a packed row; longer records are cut."""
    vocab_size: Annotated[int, _shown("TOKENS")] = 8192
    """Size of the byte-level BPE that is trained on the training records."""

    model: Annotated[str, _shown(f"{{{','.join(PRESETS)}}}")] = "tiny"
    """Shape of the model."""
    dropout: Annotated[float, _shown("P")] = 0.1
    """Probability of dropping a feature after the embedding and each attention and MLP."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmuls. Weights, optimizer and loss are float32 with either."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    autotune: bool = False
    """A sixth less time a step on a GPU; no two runs, nor a resumed one, then have equal bits."""

    label_smoothing: Annotated[float, _shown("BETA")] = 0.1
    """Probability β that the training target spreads evenly over the whole vocabulary."""
    z_loss: Annotated[float, _shown("LAMBDA")] = 0.0
    """Weight of the penalty λ·lse², which keeps the logits near 0."""
    softcap: Annotated[float | None, _shown("CAP", "off")] = None
    """Bound logits to ±CAP by CAP·tanh(z/CAP)."""
    reduction: Literal["mean", "sum"] = "mean"
    """Minimise the loss per response token, or its sum over the step; clipping tells them apart."""
    implementation: Annotated[str, _shown("NAME")] = "auto"
    """Backend of the loss: auto, reference, chunked, or a kernel's name."""

    steps: Annotated[int | None, _shown("N", f"{DEFAULT_STEPS}, or as --epochs says")] = None
    """Optimizer steps."""
    epochs: Annotated[float | None, _shown("X", "as --steps says")] = None
    """Times to see all training rows, instead of --steps."""
    batch_size: Annotated[int, _shown("ROWS")] = 4
    """Rows that are in memory at a time."""
    devices: Annotated[int, _shown("N")] = 1
    """Devices of this machine that share these rows. Each holds the whole model."""
    accumulate: Annotated[int, _shown("K")] = 1
    """Batches whose gradients make one step, the same as one batch K times as large."""
    learning_rate: Annotated[float, _shown("RATE")] = 3e-3
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """What the learning rate does after warm-up."""
    warmup_steps: Annotated[int | None, _shown("N", "a tenth of all steps")] = None
    """Steps in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, _shown("RATE")] = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: Annotated[float, _shown("B")] = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: Annotated[float, _shown("B")] = 0.95
    """AdamW's decay of the mean of their squares."""
    clip_norm: Annotated[float | None, _shown("NORM")] = 1.0
    """Longest gradient, all parameters together; None leaves gradients as they are."""
    seed: int = 0
    """Of weights, dropout, order of the data, and questions."""

    out: Annotated[Path | None, _shown("FOLDER", "a new folder under runs/")] = None
    """The run's folder: new or empty, unless --resume or --overwrite is given."""
    resume: bool = False
    """Go on with the run in --out, or the newest under runs/. Flags not given are as they were."""
    overwrite: bool = False
    """Remove the run that is in --out first."""
    eval_every: Annotated[int | None, _shown("STEPS", "at the end only")] = None
    """Evaluate on the held-out records during training too."""
    checkpoint_every: Annotated[int, _shown("STEPS")] = 100
    """Steps from one checkpoint to the next; there is always one at the end."""
    keep: Annotated[int, _shown("N")] = 2
    """Newest checkpoints to keep."""
    log_every: Annotated[int, _shown("STEPS")] = 1
    """Steps from one row of metrics.jsonl to the next."""

    def __post_init__(self) -> None:
        _require(0 <= self.held_out < 1, f"--held-out must be in [0, 1), not {self.held_out}")
        _require(
            self.vocab_size >= MIN_VOCAB_SIZE,
            f"--vocab-size must be at least {MIN_VOCAB_SIZE} (the bytes and the special tokens),"
            f" not {self.vocab_size}",
        )
        _require(
            self.model in PRESETS, f"--model must be one of {', '.join(PRESETS)}, not {self.model}"
        )
        _require(0 <= self.dropout < 1, f"--dropout must be in [0, 1), not {self.dropout}")
        _require(
            0 <= self.label_smoothing <= 1,
            f"--label-smoothing must be in [0, 1], not {self.label_smoothing}",
        )
        _require(0 <= self.seed < 2**32, f"--seed must be in [0, 2**32), not {self.seed}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{flag(name)} must be in [0, 1), not {value}")
        for name in ("z_loss", "weight_decay"):
            value = getattr(self, name)
            _require(
                0 <= value < math.inf, f"{flag(name)} must be finite and at least 0, not {value}"
            )
        for name in ("learning_rate", "softcap", "clip_norm", "epochs"):
            value = getattr(self, name)
            _require(
                value is None or 0 < value < math.inf,
                f"{flag(name)} must be finite and more than 0, not {value}",
            )
        for name in (
            "steps", "batch_size", "devices", "accumulate", "eval_every",
            "checkpoint_every", "keep", "log_every",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{flag(name)} must be at least 1, not {value}")
        _require(
            self.max_length >= MIN_LENGTH,
            f"--max-length must be at least {MIN_LENGTH} tokens, not {self.max_length}",
        )
        _require(
            self.batch_size % self.devices == 0,
            f"--batch-size {self.batch_size} must be a multiple of --devices {self.devices}",
        )
        _require(
            self.steps is None or self.epochs is None,
            f"--steps {self.steps} and --epochs {self.epochs} contradict each other: give one",
        )
        _require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"--warmup-steps must be at least 0, not {self.warmup_steps}",
        )
        if self.epochs is None:
            self.steps_of_warmup(self.steps or DEFAULT_STEPS)
        _require(
            not (self.eval_every and not self.held_out),
            f"--eval-every {self.eval_every} needs held-out records, but --held-out is 0",
        )
        _require(
            not (self.resume and self.overwrite),
            "--resume and --overwrite contradict each other: go on with the run, or remove it",
        )

    def steps_of_warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`; ValueError if there are not so many."""
        steps = total_steps // 10 if self.warmup_steps is None else self.warmup_steps
        _require(
            steps <= total_steps, f"--warmup-steps {steps} is more than all {total_steps} steps"
        )
        return steps

    def changed_since(self, earlier: TrainConfig) -> list[str]:
        """Flags whose change would make resumed training differ from uninterrupted training.

        `--data` is not among them, since files may move: the loader checks what is in them. The
        number of steps is not, if nothing else depends on it.
        """
        free = {"data", "out", "resume", "overwrite", "eval_every", "checkpoint_every", "keep"}
        free |= {"log_every"}
        if self.schedule == "constant" and self.warmup_steps is not None:
            free |= {"steps", "epochs"}
        return [
            f"{flag(name)} was {before} and is {now}"
            for name, before in vars(earlier).items()
            if name not in free and before != (now := getattr(self, name))
        ]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
