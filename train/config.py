"""All that a run can be told: parts side by side, the only source of flags, defaults and help.

Each part stands beside what it configures and checks itself; here is what concerns several. Flags
are flat: `--learning-rate` is `config.optimizer.learning_rate`, and no two parts share a name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import tyro

from train.data.options import DataOptions
from train.flags import flag, require
from train.models.config import SHAPES
from train.models.options import ModelOptions
from train.run.options import (
    DEFAULT_STEPS,
    HostOptions,
    LossOptions,
    OptimizerOptions,
    RunOptions,
    StepOptions,
    TrainedOptions,
)

FREE = {
    *("out", "resume", "overwrite", "eval_every", "samples", "checkpoint_every", "keep"),
    *("log_every", "wandb", "coordinator", "processes", "process"),
}
"""Flags that leave the weights at the end of a run as they are."""
TOLD = {
    *("learning_rate", "schedule", "warmup_steps", "weight_decay", "beta1", "beta2", "clip_norm"),
    *("steps", "epochs", "remat", "memory", "mesh", "autotune", "implementation"),
    "gradient_filter",
}
"""Flags that a run may go on with changed, though not to the same end: how it is optimised and
computed. What is learnt (the data, the model, the loss, the seed) makes another run. How the rows
of a step are divided may change, too, if there are as many."""


FINE_TUNING: Mapping[str, Any] = {
    "learning_rate": 2e-5,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "max_length": 512,
    "remat": "block",
}
"""Flags not given, where `--model` is one that others trained."""
ADAPTERS: Mapping[str, Any] = {"learning_rate": 2e-4, "weight_decay": 0.0}
"""Flags not given, where `--lora-rank` is. Adapters take about ten times the rate of all weights:
https://thinkingmachines.ai/blog/lora/."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a language model with label smoothing, and measure how calibrated it is.

    With no flags at all, a small model learns question and answer pairs from Python's own
    documentation in a few minutes on a CPU. The run's folder then holds metrics.jsonl, eval.json,
    reliability.png, TensorBoard events and checkpoints.
    """

    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    loss: LossOptions = dataclasses.field(default_factory=LossOptions)
    trained: TrainedOptions = dataclasses.field(default_factory=TrainedOptions)
    step: StepOptions = dataclasses.field(default_factory=StepOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    hosts: HostOptions = dataclasses.field(default_factory=HostOptions)

    def __post_init__(self) -> None:
        require(
            self.hosts.coordinator is None or self.run.out is not None,
            f"--coordinator {self.hosts.coordinator} needs --out: a folder that all processes see",
        )
        if self.run.epochs is None:
            self.optimizer.steps_of_warmup(self.run.steps or DEFAULT_STEPS)
        if not self.data.held_out and not self.data.eval_data:
            for name in ("eval_every", "samples"):
                asked = getattr(self.run, name)
                require(
                    not asked, f"{flag(name)} {asked} needs held-out records, but --held-out is 0"
                )

    @property
    def samples(self) -> int:
        """Held-out prompts that are answered at each evaluation."""
        if self.run.samples is not None:
            return self.run.samples
        return 2 if self.run.eval_every and self.model.model not in SHAPES else 0

    @classmethod
    def defaults(cls, model: str, *, lora: bool = False) -> Self:
        """The configuration of which flags are not given, with that model, and with adapters."""
        flags = {} if model in SHAPES else FINE_TUNING
        return cls.of(model=model, **{**flags, **(ADAPTERS if lora else {})})

    @classmethod
    def of(cls, **flags: Any) -> Self:
        """The configuration with these flags by their fields' names, whatever part has them.

        >>> TrainConfig.of(softcap=30.0).loss.softcap
        30.0
        """
        return cls().replace(**flags)

    def replace(self, **flags: Any) -> Self:
        """The same but for these flags, by their fields' names; TypeError for a name of none."""
        parts = {}
        for name, part in vars(self).items():
            own = {field: flags.pop(field) for field in vars(part) if field in flags}
            parts[name] = dataclasses.replace(part, **own)
        if flags:
            raise TypeError(f"no flag is called {', '.join(flags)}")
        return dataclasses.replace(self, **parts)

    def flags(self) -> dict[str, Any]:
        """The value of every flag, by its field's name."""
        return {name: value for part in vars(self).values() for name, value in vars(part).items()}

    def changed_since(self, earlier: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Flags whose change makes the weights at the end others: before and now, by name.

        `--data` is not among them, since files may move: the loader checks what is in them. The
        number of steps is not, if nothing else depends on it.
        """
        free = FREE | {"data", "eval_data"}
        if self.optimizer.schedule == "constant" and self.optimizer.warmup_steps is not None:
            free |= {"steps", "epochs"}
        if self.model.dtype == "auto":  # whatever it was
            free |= {"dtype"}
        now = self.flags()
        return {
            name: (before, now[name])
            for name, before in earlier.flags().items()
            if name not in free and before != now[name]
        }


def described(changes: dict[str, tuple[Any, Any]]) -> str:
    """`--seed was 0 and is 7; --beta1 was 0.9 and is 0.5`."""
    return "; ".join(f"{flag(name)} was {old} and is {new}" for name, (old, new) in changes.items())


FLAT = (tyro.conf.OmitArgPrefixes,)
"""For tyro: the names of the parts are no part of the flags' names."""
