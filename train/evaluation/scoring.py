"""How good and how well calibrated a model is on held-out data: over tokens, and over questions.

Both come from one jitted function over rows of packed examples, which returns a few numbers a token
from the loss's own statistics. No array of N×V is ever made, whatever the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

import lsce
from lsce import calibration
from train import mesh
from train.data.encode import encode_records
from train.data.packing import IGNORE, Rows, pack
from train.data.records import Message, Record
from train.evaluation.tasks.held_out import Question
from train.models.decoder import Decoder, looped
from train.text.tokenizer import Example, Tokenizer

BINS = 15

Scoring = Literal["sum", "per_token"]
"""How an option's log-likelihood is read: summed over its tokens, or their mean."""
REPORTED: Scoring = "per_token"
"""The scoring that tables and pictures show; `eval.json` has both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How held-out records are scored."""

    batch_size: int
    """Rows that are in memory at a time; shared by all devices of the model."""
    max_length: int
    """Tokens in a row."""
    softcap: float | None = None
    """As in training."""


class EvaluationData(Protocol):
    """The part of `tasks.held_out.Exam` that an evaluation reads."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def held_out(self) -> Rows: ...

    @property
    def questions(self) -> Sequence[Question]: ...


@dataclasses.dataclass(frozen=True)
class Scores:
    """What n predictions are worth. `ece` and `rms` are `lsce.calibration`'s."""

    n: int
    nll: float
    """Mean of −log p of the truth, nats."""
    accuracy: float
    ece: float
    """Over 15 even bins."""
    rms: float
    """Root mean square calibration error over equal-mass bins of about 100 predictions."""
    brier: float
    """Mean of Σ_k (p_k − [k is the truth])², in [0, 2]."""
    mean_confidence: float
    confidence: Float32[np.ndarray, " n"] = dataclasses.field(repr=False)
    """The probability of each prediction's likeliest class."""
    correct: Bool[np.ndarray, " n"] = dataclasses.field(repr=False)
    """Whether the likeliest class is the truth."""

    @classmethod
    def of(
        cls,
        log_prob: Float[np.ndarray, " n"],
        confidence: Float[np.ndarray, " n"],
        correct: Bool[np.ndarray, " n"],
        brier: Float[np.ndarray, " n"],
    ) -> Self:
        """Averages n ≥ 1 predictions, given what `TokenScores` holds of each."""
        confidence = np.asarray(confidence, np.float32)

        def mean(values: np.ndarray) -> float:
            return float(np.mean(values, dtype=np.float64))

        return cls(
            n=len(log_prob),
            nll=-mean(log_prob),
            accuracy=mean(correct),
            ece=float(calibration.expected_calibration_error(confidence, correct, bins=BINS)),
            rms=float(calibration.rms_calibration_error(confidence, correct)),
            brier=mean(brier),
            mean_confidence=mean(confidence),
            confidence=confidence,
            correct=correct,
        )

    def summary(self) -> dict[str, int | float]:
        """The numbers without the arrays."""
        arrays = ("confidence", "correct")
        return {name: value for name, value in vars(self).items() if name not in arrays}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out scores."""

    tokens: Scores | None
    """Next-token prediction over response tokens; None when no records are held out."""
    choices: dict[Scoring, Scores]
    """Multiple-choice questions, by how options were scored; empty when there are no questions."""
    chance: float | None
    """The accuracy of guessing at the questions; None when there are none."""
    left_out: int
    """Questions with an option that does not fit into `max_length` tokens."""


class TokenScores(NamedTuple):
    """What is known of each prediction of a token, in jax or numpy arrays.

    Meaningless where the label is −100.
    """

    log_prob: Float32[Any, "B T"]
    """log p_y in nats: target_logit − lse."""
    confidence: Float32[Any, "B T"]
    """max_v p_v."""
    correct: Bool[Any, "B T"]
    brier: Float32[Any, "B T"]
    """Σ_v (p_v − [v = y])² = 1 − 2 p_y + Σ_v p_v²."""


def evaluate(model: Decoder, data: EvaluationData, how: ScoringOptions) -> Evaluation:
    """Scores the held-out tokens and the multiple-choice questions.

    The probability of a token is the model's own, softcap included: neither label smoothing nor
    z-loss enters, and dropout is off. An option of a question is the full text of an answer; its
    log-likelihood, given the prompt, is summed over its tokens ("sum") or averaged over them
    ("per_token", which does not favour short answers), and a softmax over the options makes it a
    probability. The token that ends an answer is not scored, as in lm-evaluation-harness.
    """
    questions = fitting_questions(data, how.max_length)
    choices: dict[Scoring, Scores] = {}
    if questions:
        answers = np.array([question.answer for question, _ in questions])
        examples = [example for _, options in questions for example in options]
        options = [len(options) for _, options in questions]
        total, count = log_likelihoods(model, examples, how)
        choices["sum"] = choice_scores(total, options, answers)
        choices["per_token"] = choice_scores(total / count, options, answers)
    return Evaluation(
        tokens=evaluate_tokens(model, data, how),
        choices=choices,
        chance=float(np.mean([1 / len(o) for _, o in questions])) if questions else None,
        left_out=len(data.questions) - len(questions),
    )


def evaluate_tokens(model: Decoder, data: EvaluationData, how: ScoringOptions) -> Scores | None:
    """Scores the prediction of each held-out response token; None when there are none."""
    counted = data.held_out.labels != IGNORE
    if not counted.any():
        return None
    scores = score_rows(model, data.held_out, how)
    return Scores.of(*(field[counted] for field in scores))


def score_rows(model: Decoder, rows: Rows, how: ScoringOptions) -> TokenScores:
    """`TokenScores` of R rows as numpy arrays [R, T].

    Batches have `how.batch_size` rows, the last one filled up with rows of padding, so that one
    compilation serves every evaluation of a run.
    """
    graphdef, params = nnx.split(looped(model))  # whatever the training step is
    scored = []
    for start in range(0, len(rows), how.batch_size):
        batch = rows[start : start + how.batch_size]
        missing = how.batch_size - len(batch["tokens"])
        filling = {"labels": IGNORE}
        padded = {
            name: np.pad(array, ((0, missing), (0, 0)), constant_values=filling.get(name, 0))
            for name, array in batch.items()
        }
        scored.append(score_batch(graphdef, params, padded, how.softcap))
    parts = jax.device_get(scored)
    return TokenScores(*(np.concatenate(field)[: len(rows)] for field in zip(*parts, strict=True)))


@functools.partial(
    jax.jit, static_argnames=("graphdef", "softcap"), compiler_options=mesh.REPEATABLE
)
def score_batch(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    batch: dict[str, Int[Array, "B _"]],
    softcap: float | None,
) -> TokenScores:
    """One batch through the model and the loss, of which only the statistics are used."""
    model = nnx.merge(graphdef, params)
    batch = mesh.rows(batch, mesh.of(params))
    hidden = model(batch["tokens"], batch["segments"], batch["positions"], batch.get("starts"))
    _, stats = lsce.linear_cross_entropy(
        hidden,
        model.head,
        batch["labels"],
        ignore_index=IGNORE,
        softcap=softcap,
        reduction="none",
        return_stats=True,
    )
    log_prob = stats.target_logit - stats.lse
    brier = 1 - 2 * jnp.exp(log_prob) + stats.sum_p_squared
    scores = TokenScores(log_prob, stats.confidence, stats.correct, brier)
    return mesh.everywhere(scores, mesh.of(params))


def fitting_questions(
    data: EvaluationData, max_length: int
) -> list[tuple[Question, list[Example]]]:
    """The questions of which prompt and option fit into `max_length` tokens, for every option.

    Each comes with its options as examples whose loss mask covers the option's text. A prompt cut
    shorter for one option than for another would make the options incomparable.
    """
    records = [
        Record((*question.prompt, Message("assistant", option)), question.source)
        for question in data.questions
        for option in question.options
    ]
    encoded = iter(encode_records(data.tokenizer, records, max_length) if records else [])
    kept = []
    for question in data.questions:
        examples = [next(encoded) for _ in question.options]
        whole = [e for (e,) in filter(None, examples) if e.removed == 0]
        if len(whole) == len(question.options):
            kept.append((question, [without_end(example) for example in whole]))
    return kept


def without_end(example: Example) -> Example:
    """The example with the loss taken on the response's text, and not on the token that ends it."""
    mask = example.loss_mask.copy()
    mask[np.flatnonzero(mask)[-1]] = False  # a template may have more behind it, without loss
    return dataclasses.replace(example, loss_mask=mask)


def log_likelihoods(
    model: Decoder, examples: Sequence[Example], how: ScoringOptions
) -> tuple[Float[np.ndarray, " E"], Int[np.ndarray, " E"]]:
    """Σ log p over each example's response tokens, in nats, and the number of these tokens."""
    rows = pack(examples, how.max_length)
    counted = rows.labels != IGNORE
    owner = owners(examples, how.max_length)[counted]
    log_prob = score_rows(model, rows, how).log_prob[counted]
    count = np.bincount(owner, minlength=len(examples))
    return np.bincount(owner, log_prob, minlength=len(examples)), count


def owners(examples: Sequence[Example], length: int) -> Int[np.ndarray, "R T"]:
    """Which example each token of `pack(examples, length)` is of."""
    named = [
        dataclasses.replace(example, tokens=np.full_like(example.tokens, i))
        for i, example in enumerate(examples)
    ]
    return pack(named, length).tokens


def choice_scores(
    score: Float[np.ndarray, " E"], options: Sequence[int], answers: Int[np.ndarray, " Q"]
) -> Scores:
    """Scores Q questions by a softmax over their options' scores.

    Args:
      score: of the options of all questions, one question after another.
      options: how many options each question has; K is the largest.
      answers: the index of each question's right option.
    """
    present = np.arange(max(options)) < np.array(options)[:, None]
    padded = np.full(present.shape, -np.inf)
    padded[present] = score
    log_probs = padded - np.logaddexp.reduce(padded, axis=1, keepdims=True)
    probs = np.exp(log_probs)
    log_prob = log_probs[np.arange(len(answers)), answers]
    return Scores.of(
        log_prob=log_prob,
        confidence=probs.max(axis=1),
        correct=probs.argmax(axis=1) == answers,
        brier=1 - 2 * np.exp(log_prob) + np.sum(probs**2, axis=1),
    )
