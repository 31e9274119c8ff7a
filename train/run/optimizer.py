"""AdamW: a learning rate that warms up and decays, gradients clipped by their global norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from train.run.options import OptimizerOptions

Schedule = Callable[[int], float]
"""The learning rate of the update that follows that many earlier ones."""


def learning_rate(options: OptimizerOptions, total_steps: int) -> Schedule:
    """The learning rate over a run of `total_steps`.

    It rises in a straight line and is at its peak at update number `warmup_steps` (counted from 1).
    Then "constant" stays there, while "linear" and "cosine" fall to 0, which they would reach one
    update after the last. ValueError if there are fewer steps than warm up.
    """
    warmup = max(options.steps_of_warmup(total_steps), 1)
    decay_steps = max(total_steps + 1 - warmup, 1)

    def rate(count: int) -> float:
        update = count + 1
        progress = min(max((update - warmup) / decay_steps, 0), 1)
        decay = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "constant": 1.0,
        }[options.schedule]
        return options.learning_rate * min(update / warmup, 1) * decay

    return rate


@functools.cache
def adamw(
    *, beta1: float, beta2: float, weight_decay: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """Clip, then AdamW, which decays matrices and not the scales of norms, nor biases.

    The updates are for a learning rate of −1: the step multiplies them by its rate, so that a rate
    and its schedule are numbers that a compiled step is given, and not part of it. The same options
    give the same object, by which a compiled step is found again.

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=beta1, b2=beta2),
        optax.add_decayed_weights(weight_decay, mask=_decayed),
    )


def optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """The `adamw` of the flags."""
    return adamw(
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
    )


def _decayed(params: optax.Params) -> Any:
    # By name, since a stack of all layers' scales has two dimensions, as a matrix has.
    def decayed(path: Any, _: Any) -> bool:
        return not any(name in jax.tree_util.keystr(path) for name in ("'scale'", "'bias'"))

    return jax.tree_util.tree_map_with_path(decayed, params)
