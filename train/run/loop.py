"""A run from its configuration to its report: prepare, train, evaluate."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lsce
from train import mesh as devices
from train.config import DEFAULT_STEPS, TrainConfig
from train.data import loader
from train.evaluation import report
from train.evaluation.scoring import REPORTED, Evaluation, evaluate
from train.evaluation.tasks.held_out import Exam
from train.models.config import PRESETS, ModelConfig
from train.models.decoder import Decoder
from train.run import folder as run_folder
from train.run.checkpoint import Checkpointer
from train.run.monitor import METRICS, Monitor, MonitorConfig, cut_rows_after
from train.run.optimizer import adamw, learning_rate
from train.run.signals import stop_requests
from train.run.step import StepMetrics, TrainState, loss_options, train_step, train_step_autotuned

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int, step: int, out: Path) -> None:
        self.signum = signum
        super().__init__(
            f"{signal.Signals(signum).name}: stopped after step {step}, which is saved;"
            f" --resume --out {shlex.quote(str(out))} goes on from there"
        )


class NotFiniteError(ArithmeticError):
    """The loss, a gradient or a weight became NaN or infinite."""

    def __init__(self, step: int, metrics: StepMetrics, saved: int | None) -> None:
        kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was due yet"
        super().__init__(
            f"step {step}: loss {metrics.loss:.4g}, gradient norm {metrics.grad_norm:.4g}: NaN or"
            f" infinity in the loss, the gradient or the updated weights; {kept}. A lower"
            " --learning-rate, more --warmup-steps or a --clip-norm may help"
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that can start: everything is checked and loaded, and what is resumed is restored."""

    config: TrainConfig
    out: Path
    data: loader.Data
    exam: Exam
    rate: optax.Schedule
    checkpointer: Checkpointer
    state: TrainState
    """At the start. The first step reuses its memory."""
    first_step: int
    """Steps done before; 0 for a new run."""
    total_steps: int


def run(config: TrainConfig) -> Evaluation:
    """Prepares and trains; raises what `prepare` and `train` raise."""
    return train(prepare(config))


def prepare(config: TrainConfig) -> Run:
    """Makes the data and the model, restores what is resumed, and claims the run's folder.

    Raises ValueError or OSError, with a message for the user, for what is wrong with the
    configuration, the folder or the data. Nothing in the folder has changed then.
    """
    shape = check(config)
    run_folder.find(config)
    for path in config.data if config.resume else ():
        if not path.exists():
            raise ValueError(f"the run's data {path} is gone: say with --data where it is now")
    data = loader.build(
        data=config.data,
        held_out=config.held_out,
        max_length=config.max_length,
        batch_size=config.batch_size * config.accumulate,
        vocab_size=config.vocab_size,
        seed=config.seed,
        skip_bad_records=config.skip_bad_records,
    )
    logger.info("data: %s", data.counts)
    shape = dataclasses.replace(shape, vocab_size=data.tokenizer.vocab_size)
    total_steps = (
        data.train.steps(config.epochs) if config.epochs else config.steps or DEFAULT_STEPS
    )
    if total_steps >= 2**31:
        raise ValueError(f"{total_steps:,} steps are more than the optimizer can count (2**31 - 1)")
    rate = learning_rate(
        config.learning_rate,
        schedule=config.schedule,
        warmup_steps=config.steps_of_warmup(total_steps),
        total_steps=total_steps,
    )
    create = state_maker(config, shape, rate)

    first_step, state = 0, None
    if config.resume:
        out = run_folder.find(config)
        with Checkpointer(out, keep=config.keep) as old:
            first_step = old.latest_step() or 0
            if first_step > total_steps:
                raise ValueError(
                    f"{out} is at step {first_step} already, past all {total_steps} steps"
                )
            if first_step:
                data.train.set_state(old.position(first_step))
                state = old.state(first_step, like=jax.eval_shape(create, config.seed))
        cut_rows_after(out / METRICS, first_step)
    if state is None:
        state = create(config.seed)
    out = run_folder.claim(config)
    config = dataclasses.replace(config, out=out)
    checkpointer = Checkpointer(out, keep=config.keep)
    logger.info("run: %s", out)
    size = sum(weight.size for weight in jax.tree.leaves(state.params))
    logger.info("model: %s, %s parameters", config.model, f"{size:,}")
    if first_step < total_steps:
        logger.info("steps: %d to %d", first_step + 1, total_steps)
    else:
        logger.info("steps: all %d are done", total_steps)
    exam = Exam.of(data, config.seed)
    return Run(config, out, data, exam, rate, checkpointer, state, first_step, total_steps)


def check(config: TrainConfig) -> ModelConfig:
    """The model's shape, if this machine can train it so, as far as is known without the data.

    Raises ValueError otherwise.
    """
    shape = dataclasses.replace(
        PRESETS[config.model],
        vocab_size=config.vocab_size,
        dropout=config.dropout,
        dtype=config.dtype,
        remat=config.remat,
    )
    check_loss(config, shape)
    devices.check(config.devices)
    return shape


def train(run: Run) -> Evaluation:
    """Trains to the last step, then evaluates and writes the report.

    Raises:
      Interrupted: on SIGTERM or SIGINT, once the state is saved. A second signal does not wait.
      NotFiniteError: at a NaN or an infinity, which is in no checkpoint.
    """
    config, data, state = run.config, run.data, run.state
    take_step = train_step_autotuned if config.autotune else train_step
    monitor = Monitor(cast(MonitorConfig, config), run.total_steps, start_step=run.first_step)

    def evaluate_during(step: int) -> None:
        due = config.eval_every and step and step % config.eval_every == 0
        if due and step != run.total_steps and step not in monitor.evaluated:
            with monitor.paused(), stop.at_once():
                monitor.evaluation(step, headline(evaluate(state.model, run.exam, config)))

    with stop_requests() as stop, monitor, run.checkpointer:
        evaluate_during(run.first_step)  # where a signal cut it off
        for step in range(run.first_step + 1, run.total_steps + 1):
            state, metrics = take_step(state, next(data.train), config)
            metrics = jax.device_get(metrics)
            if not metrics.finite:
                raise NotFiniteError(step, metrics, run.checkpointer.latest_step())
            monitor.step(step, as_row(metrics, run.rate(step - 1)))

            evaluate_during(step)
            if stop.signum or step % config.checkpoint_every == 0 or step == run.total_steps:
                with monitor.paused():
                    run.checkpointer.save(step, state, data.train.state())
            if stop.signum:
                raise Interrupted(stop.signum, step, run.out)

        monitor.say("evaluating")
        with stop.at_once():
            evaluation = evaluate(state.model, run.exam, config)
            monitor.evaluation(run.total_steps, headline(evaluation))
            report.write(run.out, evaluation, config, step=run.total_steps)
        if stop.signum:
            raise Interrupted(stop.signum, run.total_steps, run.out)
    report.print_table(evaluation)
    logger.info("report: %s", run.out / report.RELIABILITY)
    return evaluation


def state_maker(
    config: TrainConfig, shape: ModelConfig, rate: optax.Schedule
) -> Callable[[int], TrainState]:
    """The compiled function that makes a new run's state from its seed."""
    optimizer = adamw(
        rate,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )

    @functools.partial(jax.jit, out_shardings=devices.whole(config.devices))
    def create(seed: int) -> TrainState:
        weights, dropout = jax.random.split(jax.random.key(seed))
        return TrainState.create(Decoder(shape, rngs=nnx.Rngs(params=weights)), optimizer, dropout)

    return create


def check_loss(config: TrainConfig, shape: ModelConfig) -> None:
    """Raises ValueError if `lsce` cannot take the loss that training will ask for."""
    tokens = (config.batch_size, config.max_length)
    choice = lsce.explain(
        jax.ShapeDtypeStruct((*tokens, shape.hidden_size), shape.dtype),
        jax.ShapeDtypeStruct((shape.vocab_size, shape.hidden_size), shape.dtype),
        jax.ShapeDtypeStruct(tokens, jnp.int32),
        **loss_options(config),
    )
    logger.info("loss: %s", choice.implementation)
    reason = choice.reasons["hopper"]
    # Elsewhere nobody expects a GPU's kernels.
    if jax.default_backend() == "gpu" and reason.startswith("refuses"):
        logger.info("      hopper %s", reason)


def as_row(metrics: StepMetrics, rate: jax.typing.ArrayLike) -> dict[str, Any]:
    row = metrics._asdict() | {"learning_rate": rate}
    del row["finite"]
    return row


def headline(evaluation: Evaluation) -> dict[str, float]:
    """The few numbers of an evaluation that are worth a line during training."""
    scores = {"token": evaluation.tokens, "choice": evaluation.choices.get(REPORTED)}
    return {
        f"{what}_{name}": getattr(found, name)
        for what, found in scores.items()
        if found is not None
        for name in ("nll", "accuracy", "ece")
    }
