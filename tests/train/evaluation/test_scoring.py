"""Evaluation against float64 references that hold every logit, and against one option a forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsce import calibration
from train.data.encode import encode_records
from train.data.packing import IGNORE, Rows, pack
from train.data.records import Message, Record
from train.evaluation.scoring import (
    Scores,
    ScoringOptions,
    choice_scores,
    evaluate,
    evaluate_tokens,
    score_batch,
)
from train.evaluation.tasks.held_out import Question
from train.models.config import ModelConfig
from train.models.decoder import Decoder
from train.text.bpe import BPE as Tokenizer
from train.text.bpe import train

LENGTH = 48


def how(**changes) -> ScoringOptions:
    return ScoringOptions(**{"batch_size": 4, "max_length": LENGTH} | changes)


@dataclasses.dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    held_out: Rows
    questions: Sequence[Question]


def record(prompt: str, response: str) -> Record:
    return Record((Message("user", prompt), Message("assistant", response)), prompt)


NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
RECORDS = [
    record(f"What is {name}?", " ".join([name, "is", *["very"] * (i % 5), f"number {i}"]))
    for i, name in enumerate(NAMES)
]
QUESTIONS = [
    Question(
        r.messages[:1], tuple(RECORDS[(i + j) % 11].response for j in range(4)), 0, f"question {i}"
    )
    for i, r in enumerate(RECORDS)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([m.content for r in RECORDS for m in r.messages], 300)


@pytest.fixture(scope="module")
def data(tokenizer) -> Data:
    examples = [example for (example,) in encode_records(tokenizer, RECORDS, LENGTH)]
    return Data(tokenizer, pack(examples, LENGTH), QUESTIONS)


@pytest.fixture(scope="module")
def model(tokenizer) -> Decoder:
    """A model whose blocks do something, and whose logits spread like those of a trained one."""
    shape = ModelConfig(tokenizer.vocab_size, 24, 1, 2, 1, 12, 32, dropout=0.5)
    model = Decoder(shape, rngs=nnx.Rngs(params=0))
    model.embedding.embedding[...] = model.embedding.embedding[...] * 6
    for linear in (model.blocks.attention.out, model.blocks.mlp.down):
        linear.kernel[...] = jax.random.normal(jax.random.key(1), linear.kernel.shape) / 5
    return model


@nnx.jit
def forward(model: Decoder, tokens, segments, positions):
    return model(tokens, segments, positions)


def log_softmax(model: Decoder, rows: Rows, softcap: float | None = None) -> np.ndarray:
    """log p [R, T, V] in float64, every logit at once."""
    hidden = forward(model, rows.tokens, rows.segments, rows.positions)
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.head, np.float64).T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_scores_are_those_of_all_the_logits(model, data, softcap):
    scores = evaluate_tokens(model, data, how(softcap=softcap))
    assert scores is not None
    counted = data.held_out.labels != IGNORE
    log_p = log_softmax(model, data.held_out, softcap)[counted]
    labels = data.held_out.labels[counted]
    p = np.exp(log_p)
    correct = p.argmax(1) == labels
    assert scores.n == counted.sum() > 50
    np.testing.assert_allclose(scores.nll, -log_p[np.arange(len(labels)), labels].mean(), rtol=1e-5)
    np.testing.assert_allclose(scores.accuracy, correct.mean(), rtol=1e-6)
    np.testing.assert_allclose(scores.mean_confidence, p.max(1).mean(), rtol=1e-5)
    one_hot = np.eye(p.shape[1])[labels]
    np.testing.assert_allclose(scores.brier, ((p - one_hot) ** 2).sum(1).mean(), rtol=1e-5)
    np.testing.assert_array_equal(scores.correct, correct)
    confidence = p.max(1).astype(np.float32)
    ece = calibration.expected_calibration_error(confidence, correct, bins=15)
    rms = calibration.rms_calibration_error(confidence, correct)
    np.testing.assert_allclose((scores.ece, scores.rms), (ece, rms), rtol=1e-4)


def test_the_softcap_is_part_of_the_model(model, data):
    plain, capped = (evaluate_tokens(model, data, how(softcap=cap)) for cap in (None, 2.0))
    assert plain is not None
    assert capped is not None
    assert capped.mean_confidence < 0.9 * plain.mean_confidence


def test_batches_and_their_padding_leave_no_trace(model, data):
    assert len(data.held_out) % 4
    few, one = (evaluate_tokens(model, data, how(batch_size=size)) for size in (4, 1))
    assert few is not None
    assert one is not None
    assert few.n == one.n
    np.testing.assert_allclose(few.confidence, one.confidence, rtol=1e-5)
    np.testing.assert_allclose(few.nll, one.nll, rtol=1e-6)


def one_option_a_row(model: Decoder, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Σ log p of each option's text and its number of tokens [Q, 4], with a row for each option."""
    tok = data.tokenizer
    prompts, answers = [], []
    for question in data.questions:
        (message,) = question.prompt
        prompt = [tok.bos, tok.user, *tok.encode_text(message.content), tok.end, tok.assistant]
        prompts += [prompt] * len(question.options)
        answers += [tok.encode_text(option) for option in question.options]
    tokens = np.zeros((len(answers), LENGTH), np.int32)
    for row, prompt, answer in zip(tokens, prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = prompt + answer
    one_segment = (tokens != tok.pad).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    log_p = log_softmax(model, Rows(tokens, tokens, one_segment, positions))
    totals = [
        row[np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), answer].sum()
        for row, prompt, answer in zip(log_p, prompts, answers, strict=True)
    ]
    return np.reshape(totals, (-1, 4)), np.reshape([len(a) for a in answers], (-1, 4))


def test_options_are_scored_as_if_each_were_alone(model, data):
    evaluation = evaluate(model, data, how())
    total, count = one_option_a_row(model, data)
    for scoring, score in (("sum", total), ("per_token", total / count)):
        p = np.exp(score - np.logaddexp.reduce(score, axis=1, keepdims=True))
        scores = evaluation.choices[scoring]
        assert scores.n == len(QUESTIONS)
        np.testing.assert_allclose(scores.confidence, p.max(1), rtol=1e-4)
        np.testing.assert_allclose(scores.nll, -np.log(p[:, 0]).mean(), rtol=1e-4)
        np.testing.assert_array_equal(scores.correct, p.argmax(1) == 0)
    assert evaluation.chance == 0.25
    assert evaluation.choices["sum"].nll != pytest.approx(evaluation.choices["per_token"].nll)


def test_choice_scores_are_a_softmax_over_the_options_there_are():
    score = np.array([0.0, 1.0, 2.0, 5.0, 5.0, -1.0, -1000.0])
    scores = choice_scores(score, [3, 4], np.array([2, 1]))
    probs = np.zeros((2, 4))
    probs[0, :3] = np.exp(score[:3]) / np.exp(score[:3]).sum()
    probs[1] = np.exp(score[3:] - 5) / np.exp(score[3:] - 5).sum()
    labels = np.array([2, 1])
    np.testing.assert_allclose(scores.brier, calibration.brier_score(probs, labels), rtol=1e-6)
    nll = calibration.negative_log_likelihood(probs, labels)
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-6)
    assert scores.correct.tolist() == [True, False]  # of two likeliest options, the first is taken
    assert scores.accuracy == 0.5


def test_questions_with_an_option_too_long_are_left_out(model, data):
    long = dataclasses.replace(QUESTIONS[0], options=("short", "very " * LENGTH, "a", "b"))
    found = evaluate(model, dataclasses.replace(data, questions=[long, *QUESTIONS]), how())
    assert found.left_out == 1
    np.testing.assert_allclose(
        found.choices["sum"].confidence,
        evaluate(model, data, how()).choices["sum"].confidence,
        rtol=1e-5,
    )


def test_nothing_held_out_is_no_error(model, data):
    empty = evaluate(
        model, dataclasses.replace(data, held_out=pack([], LENGTH), questions=[]), how()
    )
    assert empty.tokens is None
    assert empty.choices == {}
    assert empty.chance is None


def test_one_compilation_serves_a_run(model, data):
    traces = []

    class Counted(Decoder):
        def __call__(self, *args, **kwargs):
            traces.append(args[0].shape)
            return super().__call__(*args, **kwargs)

    counted = Counted(model.config, rngs=nnx.Rngs(params=1))
    for _ in range(2):
        evaluate(counted, data, how(batch_size=3))
    assert traces == [(3, LENGTH)]


def test_no_array_of_tokens_by_vocabulary():
    vocab_size, batch, length = 32768, 8, 256
    model = Decoder(ModelConfig(vocab_size, 16, 1, 1, 1, 16, 16), rngs=nnx.Rngs(params=0))
    names = ("tokens", "labels", "segments", "positions")
    rows = dict.fromkeys(names, jnp.zeros((batch, length), jnp.int32))
    compiled = score_batch.lower(*nnx.split(model), rows, None).compile()
    memory = compiled.memory_analysis()
    assert 0 < memory.temp_size_in_bytes < batch * length * vocab_size * 4 / 8
    assert memory.output_size_in_bytes < 64 * batch * length


def test_summary_is_numbers_only():
    scores = Scores.of(
        np.log([0.5, 0.25]), np.array([0.5, 0.75]), np.array([True, False]), np.array([0.5, 1.0])
    )
    assert scores.summary() == {
        "n": 2,
        "nll": pytest.approx(1.5 * np.log(2)),
        "accuracy": 0.5,
        "ece": pytest.approx(0.625),
        "rms": pytest.approx(0.125),
        "brier": 0.75,
        "mean_confidence": 0.625,
    }
