"""A task from questions to its result: answers, probabilities of the choices, measures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lsce import calibration
from train.data.progress import progress
from train.evaluation import measures
from train.evaluation.answers import AnswerFile, Answers
from train.evaluation.encoding import Encoded, encode
from train.evaluation.items import Item
from train.evaluation.likelihood import log_likelihoods
from train.evaluation.prompts import Answer, Prompt, continuations, word
from train.evaluation.questions import Questions
from train.evaluation.results import Scored, TaskResult, Temperature
from train.flags import require
from train.run.model import Loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are put to a model."""

    prompt: Prompt
    answer: Answer
    shots: int
    max_length: int | None
    """Tokens of a prompt with its longest choice; None for no bound."""
    batch_tokens: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """The questions of a task that a model has answered."""

    answers: Answers
    left_out: int
    shots_dropped: int
    letter_tokens: int | None
    sha256: str
    file: Path


def ask(
    loaded: Loaded,
    weights: str,
    questions: Questions,
    how: Asking,
    indices: Sequence[int],
    path: Path,
) -> Asked:
    """Has the model answer the questions at `indices`, but for those whose answers `path` holds.

    What is gone on with ends in the same numbers, to the bit, as what was not interrupted.

    Raises:
      ValueError: if not one of them fits, and what `encode` and `AnswerFile` raise.
    """
    file = AnswerFile(path, _whose(loaded, weights, questions, how))
    items = {i: questions.items[i] for i in indices}
    with progress(f"encoding {questions.name}"):
        encoded = encode(
            loaded.tokenizer,
            items,
            questions.examples,
            questions.page,
            how.prompt,
            how.answer,
            shots=how.shots,
            max_length=how.max_length,
        )
    require(
        bool(encoded),
        f"no question of {questions.name} fits into {how.max_length} tokens: --max-length",
    )
    order = list(encoded)
    known = {n for n, i in enumerate(order) if i in file.lines}
    trees = [encoded[i].tree for i in order]
    groups = [(items[i].subject, encoded[i].shots) for i in order]
    batches = log_likelihoods(
        loaded.model, trees, groups, batch_tokens=how.batch_tokens, known=known
    )
    with progress(f"evaluating {questions.name}", len(order) - len(known)) as advance:
        for batch in batches:
            answered = {order[n]: found for n, found in batch.items() if n not in known}
            file.add(
                {
                    i: _line(items[i], encoded[i], found.log_prob, found.greedy)
                    for i, found in answered.items()
                }
            )
            advance(len(answered))
    continued = [len(c) for e in encoded.values() for c in e.tree.continuations]
    return Asked(
        Answers.of({i: file.lines[i] for i in encoded}),
        left_out=len(items) - len(encoded),
        shots_dropped=sum(e.shots < how.shots for e in encoded.values()),
        letter_tokens=max(continued) if how.answer == "letters" else None,
        sha256=_digest(questions, how, encoded),
        file=path,
    )


def result(
    asked: Asked, questions: Questions, how: Asking, *, available: int, resamples: int, seed: int
) -> TaskResult:
    """Every measure of what was answered."""
    answers = asked.answers
    scorings = scored(answers, how.answer, resamples=resamples, seed=seed)
    return TaskResult(
        task=questions.name,
        data=questions.source,
        data_sha256=asked.sha256,
        questions=len(answers.index),
        available=available,
        left_out=asked.left_out,
        prompt=how.prompt,
        answer=how.answer,
        shots=how.shots,
        shots_dropped=asked.shots_dropped,
        chance=float(np.mean(1 / np.isfinite(answers.log_prob).sum(axis=1))),
        letter_tokens=asked.letter_tokens,
        reported=next(iter(scorings)),
        scorings=scorings,
        items=asked.file.name,
    )


def scored(answers: Answers, answer: str, *, resamples: int, seed: int) -> dict[str, Scored]:
    """The measures by scoring, the reported one first."""
    return {
        name: measures.score(
            log_probs, answers.label, answers.subjects, resamples=resamples, seed=seed
        )
        for name, log_probs in log_probs_by_scoring(answers, answer).items()
    }


def scores(answers: Answers, answer: str) -> dict[str, Float[np.ndarray, "N K"]]:
    """By scoring, what a softmax over the choices makes probabilities of; the main one first."""
    if answer == "letters":
        return {"choices": answers.log_prob}
    return {
        "sum": answers.log_prob,
        "per_character": answers.log_prob / answers.characters,
        "per_token": answers.log_prob / answers.tokens,
    }


def log_probs_by_scoring(answers: Answers, answer: str) -> dict[str, Float[np.ndarray, "N K"]]:
    """The choices' log-probabilities by scoring. "vocabulary" are those among all tokens."""
    found = {name: _log_softmax(score) for name, score in scores(answers, answer).items()}
    return found | ({"vocabulary": answers.log_prob} if answer == "letters" else {})


def with_temperature(
    task: TaskResult,
    answers: Answers,
    others: Answers,
    fitted_on: str,
    *,
    resamples: int,
    seed: int,
) -> TaskResult:
    """The result with, beside each softmax over choices, the same one divided by a temperature.

    Args:
      task: the result of `answers`.
      answers: of the questions that are judged.
      others: of those that the temperature is fitted on.
      fitted_on: where these come from.
    """
    fitting = scores(others, task.answer)
    scorings = dict(task.scorings)
    for name, score in scores(answers, task.answer).items():
        logits = fitting[name].astype(np.float32)
        temperature = float(calibration.fit_temperature(logits, others.label))
        log_probs = _log_softmax(score / temperature)
        cooled = measures.score(log_probs, answers.label, resamples=resamples, seed=seed)
        scorings[name] = dataclasses.replace(
            scorings[name],
            temperature=Temperature(
                temperature, fitted_on, len(others.label), cooled.measures, cooled.bins
            ),
        )
    return dataclasses.replace(task, scorings=scorings)


def checksum(params: nnx.State) -> str:
    """The checksum of weights: equal for equal ones, computed where they are."""
    sums = [int(x) for x in jax.device_get([_sum(leaf) for leaf in jax.tree.leaves(params)])]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


@jax.jit
def _sum(leaf: Array) -> Array:
    """Of the bits, each weighed by its place. Another model of the same shapes compiles nothing."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).ravel()
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1))


def _whose(loaded: Loaded, weights: str, questions: Questions, how: Asking) -> dict[str, Any]:
    """All that an answer depends on, besides the question's own index."""
    return {
        "format": "lsce-answers",
        "version": 1,
        "task": questions.name,
        "data_sha256": _digest(questions, how, dict.fromkeys(range(len(questions.items)))),
        "weights": weights,
        "dtype": loaded.shape.dtype,
        "prompt": how.prompt,
        "answer": how.answer,
        "shots": how.shots,
        "max_length": how.max_length,
    }


def _digest(questions: Questions, how: Asking, indices: Mapping[int, Any]) -> str:
    """SHA-256 of questions as they are worded, their right answers and the examples before them."""
    digest = hashlib.sha256()
    of_subjects = sorted(questions.examples.items())
    shown = [item for _, items in of_subjects for item in items[: how.shots]] if how.shots else []
    for item in [*shown, *(questions.items[i] for i in sorted(indices))]:
        worded = word(item, (), questions.page, how.prompt, how.answer)
        digest.update(json.dumps([worded, item.answer]).encode())
    return digest.hexdigest()


def _line(item: Item, encoded: Encoded, log_prob: np.ndarray, greedy: np.ndarray) -> dict[str, Any]:
    """One question's answers, as the file keeps them."""
    return {
        "name": item.name,
        "subject": item.subject,
        "shots": encoded.shots,
        "answer": item.answer,
        "log_prob": log_prob.tolist(),
        "greedy": greedy.tolist(),
        "tokens": [len(c) for c in encoded.tree.continuations],
        "characters": [len(c) - 1 for c in continuations(item, "text")],  # without the blank
    }


def _log_softmax(scores: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
