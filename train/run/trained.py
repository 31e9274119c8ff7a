"""Which weights training changes: all but those that a pattern freezes, or adapters alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from flax import nnx

from train.models.config import ModelConfig
from train.models.weights.load import shapes


def frozen(config: ModelConfig, patterns: Sequence[str]) -> tuple[str, ...]:
    """The names of the weights that match a pattern: `blocks.mlp.up.kernel` for `blocks.mlp`.

    Of a model with adapters everything else is among them, whatever the patterns.

    A pattern is of a whole name or of its first parts, with `*`, `?` and `[…]` as in a shell. The
    layers of a kind are one weight.

    Raises:
      ValueError: for a pattern that matches nothing, and where nothing is left to train.
    """
    names = [".".join(path) for path in shapes(config)]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(
                f"--freeze {pattern} matches no weight of this model: it has {', '.join(names)}"
            )
    base = shapes(dataclasses.replace(config, lora=None)) if config.lora else ()
    found = {name for name in names for pattern in patterns if _matches(name, pattern)}
    found |= {".".join(path) for path in base}
    if len(found) == len(names):
        raise ValueError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    return tuple(sorted(found))


def divide(params: nnx.State, frozen: tuple[str, ...]) -> tuple[nnx.State, nnx.State]:
    """The weights that are trained, and those of these names; `nnx.merge_state` makes them one."""

    def trained(path: tuple[Any, ...], _: object) -> bool:
        return ".".join(map(str, path)) not in frozen

    learnt, kept = nnx.split_state(params, trained, ...)
    return learnt, kept


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
