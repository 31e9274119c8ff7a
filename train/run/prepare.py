"""A run made ready: its configuration checked, its data read, its state made or restored."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import rich.console
from flax import nnx
from jax.sharding import Mesh

import lsce
from train import hosts, mesh
from train.config import TrainConfig, described
from train.data import dataset, summary
from train.evaluation.tasks.held_out import Exam
from train.models import attention, families
from train.models.config import MOST_WRITTEN_OUT, ModelConfig
from train.run import folder, memory, samples, tracker, trained
from train.run.checkpoint import Checkpointer, saved_steps
from train.run.folder import METRICS
from train.run.metrics import cut_rows_after
from train.run.model import Chosen, choose, write
from train.run.optimizer import Schedule, learning_rate, optimizer
from train.run.options import DEFAULT_STEPS
from train.run.samples import Prompts
from train.run.state import StateMaker, TrainState, first_state, state_maker
from train.run.step import arguments

logger = logging.getLogger(__name__)


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


def prepare(config: TrainConfig) -> Run:
    """Makes the data and the model, restores what is resumed, and claims the run's folder.

    Raises ValueError or OSError, with a message for the user, for what is wrong with the
    configuration, the folder or the data. Nothing in the folder has changed then.
    """
    found = hosts.alike("found", lambda: _found(config))
    config, out, first_step, model, data, total_steps = found
    rate = learning_rate(config.optimizer, total_steps)
    on = mesh.make(config.step.mesh_shape)
    config = _fitting(config, model, on, data, out)
    create = _maker(config, model, on)

    if first_step:
        state = restored(out, first_step, create, config, data, on)
    elif model.source is not None:
        state = first_state(model.source, create, config.run.seed, on)
    else:
        state = create(config.run.seed)
    out = hosts.alike("claimed", lambda: ("", _claimed(config, out, first_step, model, data)))
    config = folder.load(out)  # which whoever resumes it will have, too
    checkpointer = Checkpointer(out, keep=config.run.keep)
    exam = Exam.of(data, config.run.seed)
    records, length = data.held_out_records, config.data.max_length
    prompts = Prompts.of(records, config.samples, data.tokenizer, length)
    run = Run(config, out, data, exam, prompts, rate, checkpointer, state, first_step, total_steps)
    _announce(run, model)
    return run


class _Found(NamedTuple):
    """What there is to train, and how far it is."""

    config: TrainConfig
    out: Path
    first_step: int
    model: Chosen
    data: dataset.Data
    total_steps: int


def _found(config: TrainConfig) -> tuple[str, _Found]:
    """With a text that is the same where it is."""
    out = folder.find(config)
    if config.run.resume and config.model.dtype == "auto":
        config = config.replace(dtype=folder.load(out).model.dtype)
    first_step = max(saved_steps(out), default=0) if config.run.resume else 0
    # A run that was killed before its first checkpoint begins again, with the weights in files.
    model = choose(config, out if first_step else None)
    config = check(config, model.shape)
    _warn_of_positions(config, model)
    data = read(config, model)
    model = model.trained_on(data.tokenizer)
    total_steps = steps_in_all(config, data)
    if first_step > total_steps:
        raise ValueError(f"{out} is at step {first_step} already, past all {total_steps} steps")
    places = ("process", "out", "model", "data", "eval_data")  # whose contents count
    flags = {name: value for name, value in config.flags().items() if name not in places}
    weights = model.source.sizes if model.source else config.model.model
    text = f"{flags} {first_step} {data.position()} {weights}"
    return text, _Found(config, out, first_step, model, data, total_steps)


def _claimed(
    config: TrainConfig, out: Path, first_step: int, model: Chosen, data: dataset.Data
) -> Path:
    """The run's folder, as the first process leaves it to the run."""
    if hosts.first():
        if config.run.resume:
            cut_rows_after(out / METRICS, first_step)
            samples.write(out, first_step + 1, [])
            _note_changes(config, out)
        out = folder.claim(config, step=first_step)
        write(out, model, data.tokenizer)
    return out


def check(config: TrainConfig, shape: ModelConfig) -> TrainConfig:
    """The configuration with the model's own softcap, if none is given, and the dtype that is used.

    Raises ValueError if this machine cannot train it so, as far as is known without the data.
    """
    if config.loss.softcap is None and shape.final_softcap is not None:
        config = config.replace(softcap=shape.final_softcap)
    config = config.replace(dtype=shape.dtype)
    tracker.check(config.run.wandb)
    check_loss(config, shape)
    mesh.check(config.step.mesh_shape)
    return config


def _warn_of_positions(config: TrainConfig, model: Chosen) -> None:
    context = families.positions(model.config_json or {})
    if context and config.data.max_length > context:
        logger.warning(
            "--max-length %d is more than the %d positions that %s was made for: it has never seen"
            " the others",
            config.data.max_length,
            context,
            config.model.model,
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


def read(config: TrainConfig, model: Chosen) -> dataset.Data:
    """The data, with what became of it and an example for the user to see."""
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
    summary.show_example(data, rich.console.Console(stderr=True, quiet=not hosts.first()))
    return data


def steps_in_all(config: TrainConfig, data: dataset.Data) -> int:
    """The optimizer steps of the whole run; ValueError for more than can be counted."""
    if config.run.epochs is None:
        steps = config.run.steps or DEFAULT_STEPS
    else:
        steps = data.train.steps(config.run.epochs)
    if steps >= 2**31:
        raise ValueError(f"{steps:,} steps are more than the optimizer can count (2**31 - 1)")
    return steps


def _fitting(
    config: TrainConfig, model: Chosen, on: Mesh | None, data: dataset.Data, out: Path
) -> TrainConfig:
    """The configuration with a way to compute a step that fits into `--memory`, if it is given."""
    if config.step.memory is None:
        return config
    if config.run.resume and folder.load(out).step.memory == config.step.memory:
        return config  # what goes on with as much memory has flags that say what fits

    def maker(remat: str) -> StateMaker:
        return _maker(config.replace(remat=remat), model, on)

    return memory.fitting(config, maker, data.train.rows)


def _maker(config: TrainConfig, model: Chosen, on: Mesh | None) -> StateMaker:
    shape = dataclasses.replace(model.shape, remat=config.model.remat)
    shape = written_out(shape, repeatable=not config.step.autotune)
    frozen = trained.frozen(shape, config.trained.freeze)
    return state_maker(shape, optimizer(config.optimizer), on, frozen)


def written_out(shape: ModelConfig, *, repeatable: bool) -> ModelConfig:
    """The shape with its layers as lines of the program, on a GPU and where they are not too many.

    Where cuDNN attends a step of them is never repeatable (`ModelConfig.scan`); by `flash` it is.
    """
    worth_it = jax.default_backend() == "gpu" and shape.layers <= MOST_WRITTEN_OUT
    if worth_it and repeatable:
        here = attention.capability()
        way, _ = attention.choose(shape, length=2, segments=2, cached=False, capability=here)
        worth_it = way == "flash"
    return dataclasses.replace(shape, scan="off") if worth_it else shape


def restored(
    out: Path,
    step: int,
    create: StateMaker,
    config: TrainConfig,
    data: dataset.Data,
    on: Mesh | None,
) -> TrainState:
    """The state after `step` steps. The data's loader goes on from there."""
    with Checkpointer(out, keep=config.run.keep) as old:
        data.go_to(old.position(step))
        like = mesh.placed(jax.eval_shape(create, config.run.seed), on)
        return old.state(step, like=like)


def _note_changes(config: TrainConfig, out: Path) -> None:
    if changed := config.changed_since(folder.load(out)):
        logger.warning(
            "resumed with other flags, so not to the end that an uninterrupted run would have:"
            " %s (noted in %s)",
            described(changed),
            folder.RUN_FILE,
        )


def _announce(run: Run, model: Chosen) -> None:
    """Says what begins, before the first step is compiled."""
    config, state = run.config, run.state
    logger.info("run: %s", run.out)
    size, changes = map(_size, (state.params, trained.divide(state.params, state.frozen)[0]))
    logger.info("model: %s, %s parameters", config.model.model, f"{size:,}")
    if state.frozen:
        logger.info("       of which %s are trained (%.3g%%)", f"{changes:,}", 100 * changes / size)
    if config.step.mesh_shape.size > 1:
        logger.info(
            "mesh: %s; each device holds %s MB of %s MB of weights and moments",
            config.step.mesh_shape,
            f"{mesh.bytes_per_device(state) / 1e6:,.0f}",
            f"{sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6:,.0f}",
        )
    if (spare := model.shape.vocab_size - run.data.tokenizer.vocab_size) > 0:
        logger.info(
            "       %d of %d rows of the head are no token's; %s",
            spare,
            model.shape.vocab_size,
            "they are left out of the loss"
            if config.loss.smooth_known_tokens
            else "label smoothing is over all of them (--smooth-known-tokens leaves them out)",
        )
    if run.first_step < run.total_steps:
        epochs = f"{run.data.train.epochs(run.total_steps):.4g}"
        logger.info("steps: %d to %d (%s epochs)", run.first_step + 1, run.total_steps, epochs)
    else:
        logger.info("steps: all %d are done", run.total_steps)


def _size(params: nnx.State) -> int:
    return sum(weight.size for weight in jax.tree.leaves(params))
