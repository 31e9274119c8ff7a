"""One optimizer step: the loss on a batch, accumulation, the update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import lsce
from lsce.calibration import CalibrationState
from train import mesh
from train.data.packing import IGNORE
from train.models.decoder import Decoder
from train.run.options import LossOptions, StepOptions
from train.run.rounding import narrowed, widened
from train.run.state import TrainState
from train.run.trained import divide

Batch = Mapping[str, Int[Array, "B _"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSum:
    """Sums over tokens; divided once, when the sums of a whole step are known."""

    total: Float[Array, ""]
    """Σ L over the tokens that have a label, nats."""
    count: Int[Array, ""]
    """The number of these tokens."""
    calibration: CalibrationState
    """How often the likeliest token was right, by its probability."""

    @classmethod
    def zero(cls) -> LossSum:
        return cls(jnp.float32(0), jnp.int32(0), CalibrationState.create())

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(
            self.total + other.total,
            self.count + other.count,
            self.calibration.merge(other.calibration),
        )


class StepMetrics(NamedTuple):
    """What a step reports, as scalars on the device."""

    loss: Float[Array, ""]
    """Σ L / count before the update: nats per labelled token, smoothing and z-loss included."""
    grad_norm: Float[Array, ""]
    """Euclidean norm of the gradient before clipping, over all that is trained."""
    tokens: Int[Array, ""]
    """Tokens that have a label."""
    token_accuracy: Float[Array, ""]
    token_ece: Float[Array, ""]
    """Expected calibration error over the step's labelled tokens, in 15 even bins."""
    finite: Bool[Array, ""]
    """Whether the loss, the gradient and the updated weights hold no NaN and no infinity."""


def arguments(loss: LossOptions) -> dict[str, Any]:
    """What every call of `lsce` in training is told."""
    return {
        "ignore_index": IGNORE,
        "label_smoothing": loss.label_smoothing,
        "z_loss": loss.z_loss,
        "softcap": loss.softcap,
        "logit_scale": 1.0 / loss.temperature,
        "reduction": "sum",  # what `loss.reduction` says is done once a step, in `train_step`
        "return_stats": True,
        "implementation": loss.implementation,
        "gradient_filter": loss.left_out,
    }


def loss_sum(
    model: Decoder, batch: Batch, loss: LossOptions, dropout_key: PRNGKeyArray | None
) -> LossSum:
    """The loss of a batch of rows. The one place where training calls `lsce`.

    Rows of the head behind `known_tokens` are no part of it, so that V is that number.
    """
    where = (batch["segments"], batch["positions"], batch.get("starts"))
    hidden = model(batch["tokens"], *where, dropout_key=dropout_key)
    head = model.head[: model.config.known_tokens]
    total, stats = lsce.linear_cross_entropy(hidden, head, batch["labels"], **arguments(loss))
    labelled = batch["labels"] != IGNORE
    calibration = CalibrationState.create().update(stats.confidence, stats.correct, labelled)
    return LossSum(total, jnp.sum(labelled, dtype=jnp.int32), calibration)


def _step(
    state: TrainState,
    batch: Batch,
    rate: jax.typing.ArrayLike,
    loss: LossOptions,
    how: StepOptions,
) -> tuple[TrainState, StepMetrics]:
    """One update, at learning rate `rate`, from a batch of `accumulate` · B rows, B in memory.

    Gradients of Σ L are added up over the microbatches and divided once: by the number of labelled
    tokens for reduction="mean" (no gradient when there are none), by 1 for "sum". So the update is
    that of one large batch, however unevenly the labels fall. It is computed in float32, and
    weights and moments that are bfloat16 are rounded once, at the end.
    """
    weights, frozen = divide(state.params, state.frozen)
    micro = jax.tree.map(lambda rows: rows.reshape(how.accumulate, -1, *rows.shape[1:]), batch)
    where = mesh.of(state.params)
    micro = mesh.rows(micro, where, axis=1)
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), how.accumulate + 1)

    def objective(weights: nnx.State, batch: Batch, key: PRNGKeyArray):
        model = nnx.merge(state.graphdef, mesh.laid(weights, where), frozen)
        sums = loss_sum(model, batch, loss, key)
        return sums.total, sums

    def add(carry: tuple[nnx.State, LossSum], inputs: tuple[Batch, PRNGKeyArray]):
        gradient, sums = carry
        more_gradient, more_sums = jax.grad(objective, has_aux=True)(weights, *inputs)
        gradient = jax.tree.map(jnp.add, gradient, widened(more_gradient))
        return (gradient, sums + more_sums), None

    zero = mesh.laid(jax.tree.map(jnp.zeros_like, widened(weights)), where), LossSum.zero()
    (gradient, sums), _ = jax.lax.scan(add, zero, (micro, keys[:-1]), unroll=how.accumulate == 1)

    count = jnp.maximum(sums.count, 1).astype(jnp.float32)
    if loss.reduction == "mean":
        gradient = jax.tree.map(lambda g: g / count, gradient)
    before = weights, state.opt_state
    weights, opt_state = widened(before)
    updates, opt_state = state.optimizer.update(gradient, opt_state, weights)
    weights = jax.tree.map(lambda weight, update: weight - rate * update, weights, updates)
    weights, opt_state = narrowed((weights, opt_state), before, keys[-1])
    params = nnx.merge_state(weights, frozen)

    mean, grad_norm = sums.total / count, optax.tree.norm(gradient)
    seen = sums.calibration.compute()
    metrics = StepMetrics(
        loss=mean,
        grad_norm=grad_norm,
        tokens=sums.count,
        token_accuracy=seen.accuracy,
        token_ece=seen.ece,
        finite=jnp.isfinite(mean) & jnp.isfinite(grad_norm) & _all_finite(weights),
    )
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return mesh.laid(state, where), metrics


_compiled = functools.partial(jax.jit, static_argnames=("loss", "how"), donate_argnames="state")
train_step = _compiled(_step, compiler_options=mesh.REPEATABLE)
train_step_autotuned = _compiled(_step)
"""The same without that promise: its processes and its runs differ in their last bits on a GPU."""


def step_of(options: StepOptions) -> Any:
    """The compiled step that the flags ask for."""
    return train_step_autotuned if options.autotune else train_step


def _all_finite(tree: Any) -> Bool[Array, ""]:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
