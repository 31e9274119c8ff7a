"""A run from its configuration to its report: prepare, train, evaluate."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from flax import nnx
from jax.sharding import Mesh

import lsce
from train import mesh
from train.config import TrainConfig, described
from train.data import dataset, summary
from train.evaluation import report
from train.evaluation.scoring import REPORTED, Evaluation, ScoringOptions, evaluate
from train.evaluation.tasks.held_out import Exam
from train.models.config import MOST_WRITTEN_OUT, ModelConfig
from train.models.decoder import Decoder
from train.models.resolve import Pretrained
from train.run import files, memory, samples, tracker, trained
from train.run import folder as run_folder
from train.run.checkpoint import Checkpointer, saved_steps
from train.run.folder import METRICS, RELIABILITY
from train.run.metrics import Monitor, cut_rows_after
from train.run.model import choose
from train.run.model import write as write_model
from train.run.optimizer import Schedule, learning_rate, optimizer
from train.run.options import DEFAULT_STEPS, StepOptions
from train.run.samples import Prompts
from train.run.signals import stop_requests
from train.run.step import StepMetrics, TrainState, arguments, train_step, train_step_autotuned
from train.run.tracker import Tracker

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

    def __init__(self, step: int, metrics: StepMetrics, saved: int | None, out: Path) -> None:
        kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was due yet"
        super().__init__(
            f"step {step}: loss {metrics.loss:.4g}, gradient norm {metrics.grad_norm:.4g}: NaN or"
            f" infinity in the loss, the gradient or the updated weights; {kept}. To go on from"
            f" {f'step {saved}' if saved else 'the beginning'}, give --resume --out"
            f" {shlex.quote(str(out))} with a lower --learning-rate, more --warmup-steps or a lower"
            " --clip-norm: without a change the same would come again"
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that can start: everything is checked and loaded, and what is resumed is restored."""

    config: TrainConfig
    out: Path
    data: dataset.Data
    exam: Exam
    prompts: Prompts
    """To be answered at each evaluation."""
    rate: Schedule
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
    out = run_folder.find(config)
    # A run that was killed before its first checkpoint begins again, with the weights in files.
    model = choose(config, out if config.run.resume and saved_steps(out) else None)
    config = check(config, model.shape)
    for name, paths in config.data.files_by_flag.items() if config.run.resume else ():
        for path in paths:
            if not path.exists():
                raise ValueError(f"the run's data {path} is gone: say with {name} where it is now")
    data = dataset.build(
        data=config.data.data,
        eval_data=config.data.eval_data,
        held_out=config.data.held_out,
        max_length=config.data.max_length,
        batch_size=config.step.rows,
        vocab_size=config.data.vocab_size,
        tokenizer=model.tokenizer,
        seed=config.run.seed,
        skip_bad_records=config.data.skip_bad_records,
    )
    summary.log(data)
    summary.show_example(data, rich.console.Console(stderr=True))
    model = model.trained_on(data.tokenizer)
    if config.run.epochs is None:
        total_steps = config.run.steps or DEFAULT_STEPS
    else:
        total_steps = data.train.steps(config.run.epochs)
    if total_steps >= 2**31:
        raise ValueError(f"{total_steps:,} steps are more than the optimizer can count (2**31 - 1)")
    rate = learning_rate(config.optimizer, total_steps)
    on = mesh.make(config.step.mesh_shape)
    frozen = trained.frozen(model.shape, config.trained.freeze)

    def maker(remat: str) -> Callable[[int], TrainState]:
        shape = dataclasses.replace(model.shape, remat=remat)
        shape = written_out(shape) if config.step.autotune else shape
        return state_maker(shape, optimizer(config.optimizer), on, frozen)

    if config.step.memory is not None and not _chosen_before(config, out):
        config = fitting(config, maker, data)
    create = maker(config.model.remat)

    first_step, state = 0, None
    if config.run.resume:
        out = run_folder.find(config)
        with Checkpointer(out, keep=config.run.keep) as old:
            first_step = old.latest_step() or 0
            if first_step > total_steps:
                raise ValueError(
                    f"{out} is at step {first_step} already, past all {total_steps} steps"
                )
            if first_step:
                data.train.set_state(old.position(first_step))
                like = mesh.placed(jax.eval_shape(create, config.run.seed), on)
                state = old.state(first_step, like=like)
        changed = config.changed_since(run_folder.load(out))
        if changed:
            logger.warning(
                "resumed with other flags, so not to the end that an uninterrupted run would have:"
                " %s (noted in %s)",
                described(changed),
                run_folder.RUN_FILE,
            )
        cut_rows_after(out / METRICS, first_step)
        samples.write(out, first_step + 1, [])
    if state is None and model.source is not None:
        state = first_state(model.source, create, config.run.seed, on)
    elif state is None:
        state = create(config.run.seed)
    out = run_folder.claim(config, step=first_step)
    config = config.replace(out=out)
    write_model(out, model, data.tokenizer)
    checkpointer = Checkpointer(out, keep=config.run.keep)
    logger.info("run: %s", out)
    size, changes = map(_size, (state.params, trained.divide(state.params, state.frozen)[0]))
    logger.info("model: %s, %s parameters", config.model.model, f"{size:,}")
    if state.frozen:
        logger.info("       of which %s are trained (%.3g%%)", f"{changes:,}", 100 * changes / size)
    if on is not None:
        logger.info(
            "mesh: %s; each device holds %s MB of %s MB of weights and moments",
            config.step.mesh_shape,
            f"{mesh.bytes_per_device(state) / 1e6:,.0f}",
            f"{sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6:,.0f}",
        )
    if (spare := model.shape.vocab_size - data.tokenizer.vocab_size) > 0:
        logger.info(
            "       %d of %d rows of the head are no token's; %s",
            spare,
            model.shape.vocab_size,
            "they are left out of the loss"
            if config.loss.smooth_known_tokens
            else "label smoothing is over all of them (--smooth-known-tokens leaves them out)",
        )
    if first_step < total_steps:
        epochs = f"{data.train.epochs(total_steps):.4g}"
        logger.info("steps: %d to %d (%s epochs)", first_step + 1, total_steps, epochs)
    else:
        logger.info("steps: all %d are done", total_steps)
    exam = Exam.of(data, config.run.seed)
    records, length = data.held_out_records, config.data.max_length
    prompts = Prompts.of(records, config.samples, data.tokenizer, length)
    return Run(config, out, data, exam, prompts, rate, checkpointer, state, first_step, total_steps)


def _chosen_before(config: TrainConfig, out: Path) -> bool:
    """Whether the run that goes on was given as much memory, so that its flags say what fits."""
    return config.run.resume and run_folder.load(out).step.memory == config.step.memory


def fitting(
    config: TrainConfig, maker: Callable[[str], Callable[[int], TrainState]], data: dataset.Data
) -> TrainConfig:
    """The configuration with a way to compute a step that fits into `--memory`.

    What is compiled for that is kept as XLA's other programs are, so that the first step need not
    compile it again.
    """
    rows = data.train.rows[np.arange(config.step.rows) % len(data.train.rows)]
    held, given = jax.eval_shape(maker(config.model.remat), config.run.seed), config.step.memory
    held = mesh.bytes_per_device(mesh.placed(held, mesh.make(config.step.mesh_shape))) / memory.GB
    if given is not None and held > given:
        raise ValueError(
            f"--memory {given:g}: weights and moments alone take {held:.3g} GB of each device;"
            f" {memory.LESS} take less"
        )

    def size(remat: str, step: StepOptions) -> int:
        state = jax.eval_shape(maker(remat), config.run.seed)
        if (on := mesh.make(step.mesh_shape)) is not None:
            state = mesh.placed(state, on)
        lowered = _step_of(config).lower(state, rows, 0.0, config.loss, step)
        return memory.compiled_bytes(lowered.compile())

    remat, step = memory.choose(config.step, size)
    return config.replace(remat=remat, batch_size=step.batch_size, accumulate=step.accumulate)


def written_out(shape: ModelConfig) -> ModelConfig:
    """The shape with its layers as lines of the program, on a GPU and where they are not too many.

    A step of them is never repeatable, see `ModelConfig.scan`.
    """
    worth_it = jax.default_backend() == "gpu" and shape.layers <= MOST_WRITTEN_OUT
    return dataclasses.replace(shape, scan="off") if worth_it else shape


def check(config: TrainConfig, shape: ModelConfig) -> TrainConfig:
    """The configuration with the model's own softcap, if none is given.

    Raises ValueError if this machine cannot train it so, as far as is known without the data.
    """
    if config.loss.softcap is None and shape.final_softcap is not None:
        config = config.replace(softcap=shape.final_softcap)
    tracker.check(config.run.wandb)
    check_loss(config, shape)
    mesh.check(config.step.mesh_shape)
    return config


def train(run: Run) -> Evaluation:
    """Trains to the last step, then evaluates and writes the report.

    Raises:
      Interrupted: on SIGTERM or SIGINT, once the state is saved. A second signal does not wait.
      NotFiniteError: at a NaN or an infinity, which is in no checkpoint.
    """
    config, data, state = run.config, run.data, run.state
    take_step = _step_of(config)
    monitor = Monitor(
        run.out,
        run.total_steps,
        start_step=run.first_step,
        log_every=config.run.log_every,
        tracker=Tracker.start(config.run.wandb, run.out, files.plain(config.flags())),
    )
    scoring = scoring_options(config)

    def measure(step: int, metrics: StepMetrics, rate: float) -> None:
        metrics = jax.device_get(metrics)  # waits for the step
        if not metrics.finite:
            raise NotFiniteError(step, metrics, run.checkpointer.latest_step(), run.out)
        monitor.step(step, as_row(metrics, rate))

    def evaluate_at(step: int) -> Evaluation:
        answers = run.prompts.answered(state.model, step)
        samples.write(run.out, step, answers)
        for answer in answers:
            monitor.say(str(answer))
        evaluation = evaluate(state.model, run.exam, scoring)
        monitor.evaluation(step, headline(evaluation))
        return evaluation

    def evaluates(step: int) -> bool:
        every = config.run.eval_every
        due = every and step and step % every == 0 and step != run.total_steps
        return bool(due) and step not in monitor.evaluated

    def evaluate_during(step: int) -> None:
        if evaluates(step):
            with monitor.paused(), stop.at_once():
                evaluate_at(step)

    def saves(step: int) -> bool:
        return step % config.run.checkpoint_every == 0 or step == run.total_steps

    with stop_requests() as stop, monitor, run.checkpointer:
        evaluate_during(run.first_step)  # where a signal cut it off
        run.checkpointer.mark_best(monitor.evaluated)
        unread = []  # the last step, where its metrics are not read yet
        for step in range(run.first_step + 1, run.total_steps + 1):
            rate = run.rate(step - 1)
            with monitor.waiting():
                batch = next(data.train)
            state, metrics = take_step(state, batch, rate, config.loss, config.step)
            # Read while the device is at the next step, so that it need not wait for the host. But
            # a state is evaluated or saved only once its own are read and known to be finite.
            for before in unread:
                measure(*before)
            unread = [(step, metrics, rate)]
            if stop.signum or evaluates(step) or saves(step):
                measure(*unread.pop())
                evaluate_during(step)
                best = run.checkpointer.would_be_best(step, monitor.evaluated)
                if stop.signum or saves(step) or best:
                    with monitor.paused():
                        run.checkpointer.save(step, state, data.train.state())
                        run.checkpointer.mark_best(monitor.evaluated)
                if stop.signum:
                    raise Interrupted(stop.signum, step, run.out)
        monitor.say_waited()

        monitor.say("evaluating")
        with stop.at_once():
            evaluation = evaluate_at(run.total_steps)
            report.write(run.out, evaluation, config.flags(), step=run.total_steps)
        run.checkpointer.mark_best(monitor.evaluated)
        if stop.signum:
            raise Interrupted(stop.signum, run.total_steps, run.out)
    report.print_table(evaluation)
    logger.info("report: %s", run.out / RELIABILITY)
    return evaluation


@functools.cache
def state_maker(
    shape: ModelConfig,
    optimizer: optax.GradientTransformation,
    on: Mesh | None,
    frozen: tuple[str, ...] = (),
) -> Callable[[int], TrainState]:
    """The compiled function that makes a new run's state from its seed, each share in its place."""

    def create(seed: int) -> TrainState:
        weights, dropout = jax.random.split(jax.random.key(seed))
        model = Decoder(shape, rngs=nnx.Rngs(params=weights))
        return TrainState.create(model, optimizer, dropout, frozen)

    like = jax.eval_shape(create, 0)
    return jax.jit(create, out_shardings=mesh.shardings(like, on))


def first_state(
    source: Pretrained, create: Callable[[int], TrainState], seed: int, on: Mesh | None
) -> TrainState:
    """A new run's state, with the weights in files in place of random ones."""
    like = jax.eval_shape(create, seed)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=mesh.shardings(like, on))
    def complete(params: nnx.State, seed: int) -> TrainState:
        new = create(seed)  # of its weights XLA makes only those that no file has, as adapters
        model = nnx.merge(new.graphdef, nnx.merge_state(new.params, params))
        return TrainState.create(model, new.optimizer, new.key, new.frozen)

    return complete(source.load(on, dtype=like.model.config.weights), seed)


def _step_of(config: TrainConfig) -> Any:
    return train_step_autotuned if config.step.autotune else train_step


def scoring_options(config: TrainConfig) -> ScoringOptions:
    """How a run's evaluations score: with training's rows and softcap."""
    return ScoringOptions(
        batch_size=config.step.batch_size,
        max_length=config.data.max_length,
        softcap=config.loss.softcap,
    )


def check_loss(config: TrainConfig, shape: ModelConfig) -> None:
    """Raises ValueError if `lsce` cannot take the loss that training will ask for."""
    tokens = (config.step.batch_size, config.data.max_length)
    choice = lsce.explain(
        jax.ShapeDtypeStruct((*tokens, shape.head_columns), shape.dtype),
        jax.ShapeDtypeStruct(
            (shape.known_tokens or shape.vocab_size, shape.head_columns), shape.dtype
        ),
        jax.ShapeDtypeStruct(tokens, jnp.int32),
        **arguments(config.loss),
    )
    logger.info("loss: %s", choice.implementation)
    reason = choice.reasons["hopper"]
    # Elsewhere nobody expects a GPU's kernels.
    if jax.default_backend() == "gpu" and reason.startswith("refuses"):
        logger.info("      hopper %s", reason)


def as_row(metrics: StepMetrics, rate: float) -> dict[str, Any]:
    row = metrics._asdict() | {"learning_rate": rate}
    del row["finite"]
    return row


def _size(params: nnx.State) -> int:
    return sum(weight.size for weight in jax.tree.leaves(params))


def headline(evaluation: Evaluation) -> dict[str, float]:
    """The few numbers of an evaluation that are worth a line during training."""
    scores = {"token": evaluation.tokens, "choice": evaluation.choices.get(REPORTED)}
    return {
        f"{what}_{name}": getattr(found, name)
        for what, found in scores.items()
        if found is not None
        for name in ("nll", "accuracy", "ece")
    }
