"""`python -m train.evaluate`: multiple-choice questions, and how far the answers can be trusted."""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m train.evaluate")  # the imports below take seconds

import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from train import command_line
from train.flags import flag, require, require_count, shown

TASKS = ("mmlu", "hellaswag", "arc-easy", "arc-challenge", "sciq", "openbookqa")
EVALUATIONS = Path("evaluations")
LENGTH = 2048
"""Tokens up to which the code published with MMLU keeps solved examples, and those of a prompt for
a model that does not say its context."""
AND = " && "
"""Between the commands of a result that several made."""
OF_TASKS = ("task_data", "split", "prompt", "answer", "shots", "shots_from", "limit")
OF_TASKS += ("temperature_from", "against")
"""Flags that mean nothing without --task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Scores a model on multiple-choice questions: accuracy, calibration, selective prediction.

    Where it is stopped, the same command goes on.
    """

    model: Annotated[str, shown("RUN|MODEL")]
    """A run's folder, or what --model can be in training."""
    task: Annotated[tuple[str, ...], shown(f"{{{','.join(TASKS)},FILE}} …", "none")] = ()
    """Tasks, or files of questions: {"question", "choices", "answer": 2, "C" or the text} a line,
    CSV as MMLU's, or the published forms of the others."""
    task_data: Annotated[Path | None, shown("PATH", "the Hugging Face hub")] = None
    """A task's file, or a folder with the files of one or several tasks."""
    split: Annotated[str | None, shown("{test,validation,dev,train}", "the task's own")] = None
    """What of a task's data."""
    prompt: Annotated[
        Literal["hendrycks", "harness"] | None, shown("{hendrycks,harness}", "the task's own")
    ] = None
    """hendrycks: choices by letter, as the code published with MMLU has it; harness: as
    lm-evaluation-harness words the task."""
    answer: Annotated[
        Literal["letters", "text"] | None, shown("{letters,text}", "letters if shown")
    ] = None
    """What is scored: the letters of the choices, or their full text."""
    shots: Annotated[int | None, shown("K", "5 for mmlu, else 0")] = None
    """Solved examples before each question: the first of the dev or train split."""
    shots_from: Annotated[Path | None, shown("FILE", "the task's data")] = None
    """Where solved examples come from."""
    limit: Annotated[int | None, shown("N", "all")] = None
    """Questions of each task, drawn by the seed."""
    temperature_from: Annotated[str | None, shown("SPLIT|FILE", "none")] = None
    """Other questions, of which a temperature is fitted, reported beside the model itself:
    validation for MMLU's 1,531."""
    against: Annotated[Path | None, shown("RESULT", "none")] = None
    """Another model's result on the same questions: differences with paired intervals."""
    tokens: Annotated[tuple[Path, ...], shown("FILE …", "none")] = ()
    """Records, as --data in training, of whose responses each token is predicted."""
    checkpoint: Annotated[str, shown("best|last|STEP")] = "last"
    """Which of a run: the one with the least held-out NLL, the newest, or that of a step."""
    template: Annotated[str, shown("NAME")] = "auto"
    """Chat template of --tokens, as in training."""
    max_length: Annotated[
        int | None, shown("N", "the model's context, or 2048; 2048 for hendrycks")
    ] = None
    """Tokens of a prompt: solved examples that have no room are left out."""
    batch_tokens: Annotated[int | None, shown("N", "16384 on a GPU, 2048 on a CPU")] = None
    """Tokens that go through the model together."""
    dtype: Annotated[Literal["float32", "bfloat16"], shown("{float32,bfloat16}")] = "float32"
    """The dtype of activations and matmuls."""
    resamples: int = 1000
    """Samples of the bootstrap, for 95 % intervals; 0 for none."""
    seed: int = 0
    """Decides the sample and the bootstrap."""
    out: Annotated[Path | None, shown("FOLDER", "evaluations/MODEL")] = None
    """Where result.json, the answers and the pictures go."""
    overwrite: bool = False
    """Begin again where the folder holds another evaluation's answers."""

    def __post_init__(self) -> None:
        require(bool(self.task or self.tokens), "nothing to evaluate: give --task or --tokens")
        for name in ("limit", "max_length", "batch_tokens"):
            require_count(name, getattr(self, name))
        require(self.shots is None or self.shots >= 0, f"--shots must be at least 0: {self.shots}")
        require(self.resamples >= 0, f"--resamples must be at least 0, not {self.resamples}")
        require(0 <= self.seed < 2**32, f"--seed must be in [0, 2**32), not {self.seed}")
        require(len(set(self.task)) == len(self.task), f"--task names one twice: {self.task}")
        for name in OF_TASKS if not self.task else ():
            value = getattr(self, name)
            require(value is None, f"{flag(name)} {value} is for questions: there is no --task")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    try:
        options = command_line.read(EvaluateOptions, "python -m train.evaluate", arguments)
        words = sys.argv[1:] if arguments is None else arguments
        evaluate(options, f"python -m train.evaluate {shlex.join(words)}")
    except BrokenPipeError:
        raise  # nobody reads on
    except (ValueError, OSError) as error:
        print(f"python -m train.evaluate: {command_line.said(error)}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: EvaluateOptions, command: str) -> None:
    """Asks, measures, writes and prints.

    Raises:
      ValueError: for what is not there, cannot be read or does not go together.
    """
    from train.evaluation import questions as tasks
    from train.evaluation import results

    # What needs no model first: a user's mistake costs no minute.
    if options.out is not None:
        _require_own(options.out / results.RESULT)
    loading: dict[str, Any] = {"shots": options.shots, "shots_from": options.shots_from}
    asked_for = [
        tasks.load(name, options.task_data, split=options.split, **loading) for name in options.task
    ]
    for name in ("task_data", "split") if options.task and not {*TASKS} & {*options.task} else ():
        value = getattr(options, name)
        require(value is None, f"{flag(name)} {value} is for named tasks: --task names a file")
    fitted_on = [_fitted_on(q, options, loading) for q in asked_for]
    how = [_how(q.name, q.page, options) for q in asked_for]
    against = None
    if options.against is not None:
        against = results.read(options.against)
        for name in options.task:
            require(
                name in against.tasks,
                f"--against {options.against} has no {name}, but {', '.join(against.tasks)}",
            )

    from train.evaluation import asking, paired, pictures, token_level
    from train.evaluation.table import print_result
    from train.models import families
    from train.run import model as run_model

    loaded = run_model.read(
        options.model,
        dtype=options.dtype,
        template=options.template,
        checkpoint=options.checkpoint,
    )
    context = families.positions(loaded.config_json)
    require(
        context is None or (options.max_length or 0) <= context,
        f"--max-length {options.max_length} is more than the model's context, {context}",
    )
    weights = asking.checksum(loaded.params)
    out = options.out or EVALUATIONS / _slug(options.model, loaded.step)
    result = start_of(options, command, loaded, weights)
    measuring = {"resamples": options.resamples, "seed": options.seed}
    found: dict[str, results.TaskResult] = {}
    for questions, fitting, manner in zip(asked_for, fitted_on, how, strict=True):
        manner = dataclasses.replace(manner, max_length=_max_length(manner, context))
        where = out / f"{_slug(questions.name)}-{manner.prompt}-{manner.answer}.jsonl"
        indices = questions.sample(options.limit, options.seed)
        path = _cleared(where, options.overwrite)
        asked = asking.ask(loaded, weights, questions, manner, indices, path)
        task = asking.result(asked, questions, manner, available=len(questions.items), **measuring)
        if fitting is not None:
            path = _cleared(where.with_suffix(".temperature.jsonl"), options.overwrite)
            others = asking.ask(loaded, weights, fitting, manner, range(len(fitting.items)), path)
            task = asking.with_temperature(
                task, asked.answers, others.answers, fitting.source, **measuring
            )
        if against is not None and options.against is not None:
            task = paired.against(task, asked.answers, against, options.against, **measuring)
        found[questions.name] = task
    result = dataclasses.replace(result, tasks=found)
    if options.tokens:
        rows = {"max_length": options.max_length, "batch_tokens": options.batch_tokens}
        rows["batch_tokens"] = rows["batch_tokens"] or batch_tokens()
        tokens = token_level.score(loaded, options.tokens, **rows, **measuring)
        result = dataclasses.replace(
            result, tokens=tokens, tokens_data=" ".join(map(str, options.tokens))
        )
    out.mkdir(parents=True, exist_ok=True)
    result = _with_earlier(out, result)
    results.write(out / results.RESULT, result)
    print_result(result, out)
    pictures.write(out, result)


def start_of(options: EvaluateOptions, command: str, loaded: Any, weights: str) -> Any:
    """The result without what was found."""
    import jax

    from train import files
    from train.evaluation.results import Result
    from train.run import folder
    from train.versions import versions

    run = Path(options.model)
    flags = {}
    if loaded.step is not None:
        flags = files.plain(folder.load(run).flags())
    return Result(
        model=options.model,
        weights=weights,
        step=loaded.step,
        flags=flags,
        label_smoothing=flags.get("label_smoothing"),
        command=command,
        seed=options.seed,
        settings=files.plain(dataclasses.asdict(options)),
        versions=versions(),
        device=jax.devices()[0].device_kind,
        tasks={},
    )


def _how(name: str, page: Any, options: EvaluateOptions) -> Any:
    """How the questions of a task are put, before the model's context is known."""
    from train.evaluation.asking import Asking
    from train.evaluation.prompts import answer_by
    from train.evaluation.tasks import TASKS as BY_NAME

    task = BY_NAME.get(name)
    prompt: Any = options.prompt or (task.prompt if task else "harness")
    shots = options.shots if options.shots is not None else task.shots if task else 0
    return Asking(
        prompt=prompt,
        answer=answer_by(page, prompt, options.answer),
        shots=shots,
        max_length=options.max_length,
        batch_tokens=options.batch_tokens or batch_tokens(),
    )


def _fitted_on(asked: Any, options: EvaluateOptions, loading: dict[str, Any]) -> Any:
    """The questions that a temperature is fitted on, without those that are evaluated; None if none
    is asked for."""
    source = options.temperature_from
    if source is None:
        return None
    found = _fitting_questions(asked.name, source, options, loading)
    evaluated = {(item.context, item.question, item.choices) for item in asked.items}
    others = [i for i in found.items if (i.context, i.question, i.choices) not in evaluated]
    require(
        bool(others),
        f"--temperature-from {source} is what is evaluated on: fit on other questions",
    )
    return dataclasses.replace(found, items=others)


def _fitting_questions(
    name: str, source: str, options: EvaluateOptions, loading: dict[str, Any]
) -> Any:
    from train.evaluation import questions
    from train.evaluation.tasks import TASKS as BY_NAME

    if source in questions.SPLITS:
        require(
            name in BY_NAME,
            f"--temperature-from {source} is a split of a named task: for {name} give a file",
        )
        return questions.load(name, options.task_data, split=source, **loading)
    require(
        Path(source).is_file(),
        f"--temperature-from must be one of {', '.join(questions.SPLITS)} or a file, not {source}",
    )
    if name in BY_NAME:
        return questions.load(name, Path(source), **_own_examples(options, loading))
    return questions.load(source, **loading)


def _own_examples(options: EvaluateOptions, loading: dict[str, Any]) -> dict[str, Any]:
    """Solved examples do not come from the file of the questions."""
    if options.shots == 0 or options.shots_from is not None:
        return loading
    return {**loading, "shots": 0}


def _max_length(asking: Any, context: int | None) -> int:
    """Tokens of a prompt with its longest choice."""
    if asking.max_length is not None:
        return asking.max_length
    return min(context or LENGTH, LENGTH) if asking.prompt == "hendrycks" else context or LENGTH


def batch_tokens() -> int:
    """Tokens that go through a model together, where nobody says."""
    import jax

    return 2048 if jax.default_backend() == "cpu" else 16384


def _require_own(path: Path) -> None:
    """ValueError for a file that would be replaced and is no result of ours."""
    from train.evaluation import results

    try:
        if path.exists():
            results.read(path)
    except ValueError as error:
        raise ValueError(f"{error}: name another --out") from None


def _with_earlier(out: Path, result: Any) -> Any:
    """With what an earlier call found of the same model, computed in the same way, and this one
    was not asked for."""
    from train.evaluation import results

    try:
        earlier = results.read(out)
    except ValueError:
        return result
    same = all(earlier.settings.get(n) == result.settings[n] for n in ("dtype", "limit", "seed"))
    if not same or earlier.weights != result.weights:
        return result
    found: dict[str, Any] = {"tasks": earlier.tasks | result.tasks}
    if earlier.tasks.keys() - result.tasks.keys() or (earlier.tokens and result.tokens is None):
        before = [c for c in earlier.command.split(AND) if c != result.command]
        found["command"] = AND.join((*before, result.command))
    if result.tokens is None:
        found |= {"tokens": earlier.tokens, "tokens_data": earlier.tokens_data}
    return dataclasses.replace(result, **found)


def _cleared(path: Path, overwrite: bool) -> Path:
    if overwrite:
        path.unlink(missing_ok=True)
    return path


def _slug(name: str, step: int | None = None) -> str:
    """A name for files: of a run, with the step of its checkpoint."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/")).strip("-.") or "model"
    return slug if step is None else f"{slug}-{step}"


if __name__ == "__main__":
    sys.exit(start.run(main))
