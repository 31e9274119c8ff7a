"""The loop of a run: steps, evaluations, checkpoints, and the report at its end."""

from __future__ import annotations

import logging
import shlex
import signal
from pathlib import Path
from typing import Any

import jax

from train import files, hosts
from train.config import TrainConfig
from train.evaluation import report
from train.evaluation.scoring import REPORTED, Evaluation, ScoringOptions, evaluate
from train.run import samples
from train.run.folder import RELIABILITY
from train.run.metrics import Monitor
from train.run.prepare import Run, prepare
from train.run.signals import stop_requests
from train.run.step import StepMetrics, step_of
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


def run(config: TrainConfig) -> Evaluation:
    """Prepares and trains; raises what `prepare` and `train` raise."""
    return train(prepare(config))


def train(run: Run) -> Evaluation:
    """Trains to the last step, then evaluates and writes the report.

    Raises:
      Interrupted: on SIGTERM or SIGINT, once the state is saved. A second signal does not wait.
      NotFiniteError: at a NaN or an infinity, which is in no checkpoint.
    """
    config, data, state = run.config, run.data, run.state
    take_step = step_of(config.step)
    monitor = Monitor(
        run.out,
        run.total_steps,
        start_step=run.first_step,
        log_every=config.run.log_every,
        tracker=Tracker.start(config.run.wandb, run.out, files.plain(config.flags()))
        if hosts.first()
        else None,
        silent=not hosts.first(),
    )
    scoring = scoring_options(config)

    def measure(step: int, metrics: StepMetrics, rate: float) -> None:
        metrics = jax.device_get(metrics)  # waits for the step
        if not metrics.finite:
            raise NotFiniteError(step, metrics, run.checkpointer.latest_step(), run.out)
        monitor.step(step, as_row(metrics, rate))

    def evaluate_at(step: int) -> Evaluation:
        answers = run.prompts.answered(state.model, step)
        if hosts.first():
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

    with stop_requests(alone=hosts.count() == 1) as stop, monitor, run.checkpointer:
        evaluate_during(run.first_step)  # where a signal cut it off
        run.checkpointer.mark_best(monitor.evaluated)
        unread: list[tuple[int, Any, float]] = []  # the last step, while its metrics are not read

        def busy() -> bool:
            return any(not metrics.loss.is_ready() for _, metrics, _ in unread)

        for step in range(run.first_step + 1, run.total_steps + 1):
            rate = run.rate(step - 1)
            with monitor.waiting(busy):
                batch = next(data.train)
            asked = hosts.agree(lambda: stop.signum or 0)
            state, metrics = take_step(state, batch, rate, config.loss, config.step)
            # Read while the device is at the next step, so that it need not wait for the host. But
            # a state is evaluated or saved only once its own are read and known to be finite.
            for before in unread:
                measure(*before)
            unread[:] = [(step, metrics, rate)]
            signum = asked()
            if signum or evaluates(step) or saves(step):
                measure(*unread.pop())
                evaluate_during(step)
                best = run.checkpointer.would_be_best(step, monitor.evaluated)
                if signum or saves(step) or best:
                    with monitor.paused():
                        run.checkpointer.save(step, state, data.position())
                        run.checkpointer.mark_best(monitor.evaluated)
                if signum:
                    raise Interrupted(signum, step, run.out)
        monitor.say_waited()

        monitor.say("evaluating")
        with stop.at_once():
            evaluation = evaluate_at(run.total_steps)
            if hosts.first():
                report.write(run.out, evaluation, config.flags(), step=run.total_steps)
        run.checkpointer.mark_best(monitor.evaluated)
        if signum := hosts.agree(lambda: stop.signum or 0)():
            raise Interrupted(signum, run.total_steps, run.out)
    if hosts.first():
        report.print_table(evaluation)
    logger.info("report: %s", run.out / RELIABILITY)
    return evaluation


def scoring_options(config: TrainConfig) -> ScoringOptions:
    """How a run's evaluations score: with training's rows and softcap."""
    return ScoringOptions(
        batch_size=config.step.batch_size,
        max_length=config.data.max_length,
        softcap=config.loss.softcap,
    )


def as_row(metrics: StepMetrics, rate: float) -> dict[str, Any]:
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
