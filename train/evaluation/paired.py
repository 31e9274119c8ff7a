"""A model less another one, question by question."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from train.evaluation import measures
from train.evaluation.answers import Answers, read
from train.evaluation.asking import log_probs_by_scoring
from train.evaluation.results import RESULT, Against, Result, TaskResult
from train.flags import require


def against(
    task: TaskResult, answers: Answers, other: Result, path: Path, *, resamples: int, seed: int
) -> TaskResult:
    """The result with its differences to another's, each with a paired interval.

    Args:
      task: a model's result.
      answers: what it is the result of.
      other: the other model's result, which has the task; `path` is its file or folder, and its
        answers lie beside it.

    Raises:
      ValueError: if the other was not asked the same questions in the same words.
    """
    theirs = other.tasks[task.task]
    for what in ("prompt", "answer", "shots", "questions", "data_sha256"):
        mine, its = getattr(task, what), getattr(theirs, what)
        require(
            mine == its,
            f"--against {path} answered {task.task} with other questions or words ({what}"
            f" {its}, here {mine})",
        )
    folder = path if path.is_dir() else path.parent
    _, lines, _ = read(folder / theirs.items)
    missing = [int(i) for i in answers.index if int(i) not in lines]
    require(not missing, f"{folder / theirs.items} lacks the answers to {len(missing)} questions")
    others = Answers.of({int(i): lines[int(i)] for i in answers.index})
    mine, its = (log_probs_by_scoring(a, task.answer) for a in (answers, others))
    scorings = {
        name: measures.difference(
            log_probs, its[name], answers.label, resamples=resamples, seed=seed
        )
        for name, log_probs in mine.items()
    }
    result = path / RESULT if path.is_dir() else path
    return dataclasses.replace(
        task,
        against=Against(other.model, str(result), len(np.asarray(answers.index)), scorings),
    )
