"""AdamW: a learning rate that warms up and decays, gradients clipped by their global norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def learning_rate(
    peak: float, *, schedule: str, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """The learning rate of the update that follows `count` earlier ones.

    It rises in a straight line and is `peak` at update number `warmup_steps` (counted from 1).
    Then "constant" stays there, while "linear" and "cosine" fall to 0, which they would reach one
    update after the last.
    """
    decay_steps = max(total_steps + 1 - max(warmup_steps, 1), 1)

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1
        warmup = jnp.minimum(update / max(warmup_steps, 1), 1)
        progress = jnp.clip((update - max(warmup_steps, 1)) / decay_steps, 0, 1)
        decay = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "constant": jnp.ones_like(progress),
        }[schedule]
        return peak * warmup * decay

    return rate


def adamw(
    rate: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip_norm: float | None,
) -> optax.GradientTransformation:
    """Clip, then AdamW, which decays matrices and not the scales of norms, nor biases.

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(
        clip,
        optax.adamw(
            rate,
            b1=beta1,
            b2=beta2,
            weight_decay=weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: optax.Params) -> Any:
    # By name, since a stack of all layers' scales has two dimensions, as a matrix has.
    def decayed(path: Any, _: Any) -> bool:
        return not any(name in jax.tree_util.keystr(path) for name in ("'scale'", "'bias'"))

    return jax.tree_util.tree_map_with_path(decayed, params)
