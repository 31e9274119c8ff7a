"""One step: sums divided once, whatever the microbatches; what it reports; what it flags."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lsce.calibration import expected_calibration_error
from train import mesh
from train.config import TrainConfig
from train.data.packing import IGNORE
from train.models.config import ModelConfig
from train.models.decoder import Decoder
from train.run import step
from train.run.optimizer import adamw, learning_rate, optimizer
from train.run.options import LossOptions, StepOptions
from train.run.state import TrainState, state_maker
from train.run.step import loss_sum, train_step, train_step_autotuned
from train.run.trained import divide, frozen

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = ModelConfig(
    vocab_size=101, hidden_size=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_size=24
)
ROWS, LENGTH = 8, 12
SGD = optax.identity()  # a step at rate 1 subtracts the gradient
LOSS = LossOptions(label_smoothing=0.1, z_loss=1e-3, softcap=20.0)


def make_batch(labelled: float = 0.6) -> dict[str, np.ndarray]:
    """Rows of which the later have more labels, so that the mean of means is not the mean."""
    random = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    labels = random.integers(0, SHAPE.vocab_size, shape, dtype=np.int32)
    share = labelled * np.arange(1, ROWS + 1)[:, None] / ROWS * 2
    return {
        "tokens": random.integers(0, SHAPE.vocab_size, shape, dtype=np.int32),
        "labels": np.where(random.random(shape) < share, labels, IGNORE).astype(np.int32),
        "segments": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [("fp8", "fp8"), ("auto", "auto"), ("hidden", "hidden"), ("none", None), ("6e-5", 6e-5)],
)
def test_a_filter_is_named_or_a_number(given, expected):
    assert step.arguments(LossOptions(gradient_filter=given))["gradient_filter"] == expected


@pytest.mark.slow
def test_a_temperature_divides_the_logits():
    """Beside all that a loss can have: of a head that is so much smaller it is the same."""
    batch, state = make_batch(), make_state()
    cooler = dataclasses.replace(LOSS, temperature=2.0)
    model = nnx.merge(state.graphdef, state.params)
    hot = loss_sum(model, batch, cooler, None)
    given = mock.patch.object(
        Decoder, "head", property(lambda self: self.embedding.embedding[...] / 2)
    )
    with given:
        expected = loss_sum(model, batch, LOSS, None)
    np.testing.assert_allclose(hot.total, expected.total, rtol=1e-5)
    assert not np.isclose(hot.total, loss_sum(model, batch, LOSS, None).total, rtol=1e-3)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def create(
    shape: ModelConfig, optimizer: optax.GradientTransformation, frozen: tuple[str, ...] = ()
) -> TrainState:
    model = Decoder(shape, rngs=nnx.Rngs(params=0))
    # Larger embeddings, so that the model is sure of something.
    model.embedding.embedding[...] = 30 * model.embedding.embedding[...]
    return TrainState.create(model, optimizer, jax.random.key(5), frozen)


def make_state(
    optimizer: optax.GradientTransformation | None = None, frozen: tuple[str, ...] = (), **shape
) -> TrainState:
    optimizer = optimizer or SGD
    return create(dataclasses.replace(SHAPE, **shape), optimizer, frozen)


def gradient(batch: dict[str, np.ndarray], *, accumulate=1, loss=LOSS, **shape):
    """What `train_step` subtracts from the weights with SGD at rate 1, flat, and its metrics."""
    before = flat(make_state(**shape))
    how = StepOptions(accumulate=accumulate)
    state, metrics = train_step(make_state(**shape), batch, 1.0, loss, how)
    return before - flat(state), metrics


def flat(state: TrainState) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


def naive_loss(model: Decoder, batch: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Σ L and the probabilities, from whole logits."""
    z = model(batch["tokens"], batch["segments"], batch["positions"]) @ model.head.T
    z = LOSS.softcap * jnp.tanh(z / LOSS.softcap)
    targets = optax.smooth_labels(
        jax.nn.one_hot(batch["labels"], z.shape[-1]), LOSS.label_smoothing
    )
    lse = jax.nn.logsumexp(z, axis=-1)
    loss = lse - jnp.sum(targets * z, axis=-1) + LOSS.z_loss * lse**2
    return jnp.sum(jnp.where(batch["labels"] != IGNORE, loss, 0)), jax.nn.softmax(z)


@pytest.mark.parametrize(
    ("accumulate", "reduction"),
    [
        (1, "sum"),
        (8, "mean"),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in [(1, "mean"), (2, "mean")]),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in [(2, "sum"), (8, "sum")]),
    ],
)
def test_the_gradient_is_that_of_the_whole_batch_however_it_is_divided(reduction, accumulate):
    batch, model = make_batch(), make_state().model
    count = np.count_nonzero(batch["labels"] != IGNORE)
    loss = dataclasses.replace(LOSS, reduction=reduction)
    found, metrics = gradient(batch, accumulate=accumulate, loss=loss)

    total, whole = jax.value_and_grad(lambda model: naive_loss(model, batch)[0])(model)
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(whole)])
    if reduction == "mean":
        expected = expected / count
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert metrics.loss == pytest.approx(float(total) / count, rel=1e-5)
    assert metrics.grad_norm == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    assert metrics.tokens == count


@pytest.mark.slow
def test_rows_of_the_head_that_are_no_token_s_can_be_left_out():
    known = 90
    batch = {name: np.where(x >= known, x - known, x) for name, x in make_batch().items()}
    whole = make_state(known_tokens=known).model
    cut = make_state().model
    cut.embedding.embedding = nnx.Param(cut.embedding.embedding[:known])
    found, gradient = jax.value_and_grad(lambda model: loss_sum(model, batch, LOSS, None).total)(
        whole
    )
    expected, of_cut = jax.value_and_grad(lambda model: naive_loss(model, batch)[0])(cut)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    table, table_of_cut = (np.asarray(g.embedding.embedding[...]) for g in (gradient, of_cut))
    assert np.abs(table_of_cut).max() > 0.01
    np.testing.assert_allclose(table[:known], table_of_cut, rtol=1e-3, atol=1e-4)
    assert not np.any(table[known:])


@pytest.mark.slow
def test_a_mean_of_means_would_be_seen():
    batch = make_batch()
    whole, _ = gradient(batch)
    parts = [
        gradient({name: rows[i : i + 2] for name, rows in batch.items()})[0]
        for i in range(0, ROWS, 2)
    ]
    assert np.abs(np.mean(parts, axis=0) - whole).max() > 1e-2 * np.abs(whole).max()


@pytest.mark.slow
def test_accuracy_and_calibration_error_are_those_of_the_labelled_tokens():
    batch = make_batch()
    _, metrics = gradient(batch, accumulate=4)
    _, probs = naive_loss(make_state().model, batch)
    labelled = batch["labels"] != IGNORE
    confidence = np.asarray(probs.max(axis=-1))[labelled]
    correct = np.asarray(probs.argmax(axis=-1) == batch["labels"])[labelled]
    expected = expected_calibration_error(confidence, correct)
    assert expected > 0.01
    assert metrics.token_ece == pytest.approx(float(expected), abs=1e-5)
    assert metrics.token_accuracy == pytest.approx(correct.mean(), abs=1e-6)


def test_a_batch_without_labels_gives_no_loss_and_no_gradient():
    found, metrics = gradient(make_batch(labelled=0.0), accumulate=2)
    np.testing.assert_array_equal(found, 0)
    assert (metrics.loss, metrics.tokens, metrics.grad_norm) == (0, 0, 0)
    assert metrics.finite


@pytest.mark.slow
def test_dropout_differs_between_steps_and_microbatches_and_not_between_runs():
    batch = make_batch()
    twice = {name: np.concatenate([rows[-1:], rows[-1:]]) for name, rows in batch.items()}
    alone = {name: rows[-1:] for name, rows in batch.items()}
    one, first = gradient(batch, accumulate=2, dropout=0.3)
    again, _ = gradient(batch, accumulate=2, dropout=0.3)
    np.testing.assert_array_equal(one, again)

    frozen, how = make_state(dropout=0.3), StepOptions(accumulate=2)
    frozen, at_step_0 = train_step(frozen, batch, 0.0, LOSS, how)
    _, at_step_1 = train_step(frozen, batch, 0.0, LOSS, how)
    assert at_step_0.loss == first.loss != at_step_1.loss

    _, same_rows = gradient(twice, accumulate=2, dropout=0.3)
    _, one_row = gradient(alone, dropout=0.3)
    assert same_rows.loss != one_row.loss


@pytest.mark.slow
def test_bfloat16_accumulates_in_float32_and_is_near_float32():
    batch = make_batch()
    exact, _ = gradient(batch, accumulate=4)
    found, metrics = gradient(batch, accumulate=4, dtype="bfloat16")
    assert found.dtype == np.float32
    assert metrics.loss.dtype == jnp.float32
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05


@pytest.mark.slow
def test_frozen_weights_stay_and_the_others_learn_as_they_would_with_them():
    batch, adam = make_batch(), adamw(beta1=0.9, beta2=0.9, weight_decay=0.5, clip_norm=1.0)
    names = frozen(SHAPE, ["embedding", "norm"])
    before, how = make_state(frozen=names), StepOptions(accumulate=2)
    after, metrics = train_step(make_state(frozen=names), batch, 1.0, LOSS, how)
    unfrozen, _ = train_step(make_state(), batch, 1.0, LOSS, how)

    learnt, stayed = divide(after.params, names)
    jax.tree.map(np.testing.assert_array_equal, stayed, divide(before.params, names)[1])
    expected, others = divide(unfrozen.params, names)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), learnt, expected)
    gradient = jax.tree.map(jnp.subtract, divide(before.params, names)[0], learnt)
    assert metrics.grad_norm == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-3)
    assert metrics.grad_norm > 0.01
    for one, other in zip(jax.tree.leaves(stayed), jax.tree.leaves(others), strict=True):
        assert np.abs(one - other).max() > 1e-4

    moments = make_state(adam, names).opt_state[1]
    kept = sum(map(np.size, jax.tree.leaves(learnt)))
    assert sum(map(np.size, jax.tree.leaves((moments.mu, moments.nu)))) == 2 * kept


def test_a_frozen_tied_table_costs_no_product():
    def flops(*patterns: str) -> float:
        state = jax.eval_shape(lambda: make_state(frozen=frozen(SHAPE, patterns)))
        step = train_step.lower(state, make_batch(), 1.0, LOSS, StepOptions())
        return step.cost_analysis()["flops"]

    one_product = 2 * ROWS * LENGTH * SHAPE.hidden_size * SHAPE.vocab_size
    assert flops() - flops("embedding") > one_product


def test_an_autotuned_step_is_the_same_step():
    state, metrics = train_step_autotuned(make_state(), make_batch(), 1.0, LOSS, StepOptions())
    found, usual = flat(make_state()) - flat(state), gradient(make_batch())
    assert metrics.finite
    assert np.linalg.norm(found - usual[0]) < 1e-6 * np.linalg.norm(found)


def test_the_old_state_is_donated():
    state = make_state()
    train_step(state, make_batch(), 1.0, LOSS, StepOptions())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_weights_that_an_update_breaks_are_flagged_though_the_loss_is_finite():
    state, metrics = train_step(
        make_state(optax.scale(1e30)),
        make_batch(),
        1e30,
        LOSS,
        StepOptions(accumulate=2),
    )
    assert not np.isfinite(flat(state)).all()
    assert np.isfinite(metrics.loss)
    assert np.isfinite(metrics.grad_norm)
    assert not metrics.finite


def test_a_label_outside_the_vocabulary_is_flagged():
    batch = make_batch()
    batch["labels"][-1, -1] = SHAPE.vocab_size
    _, metrics = gradient(batch)
    assert np.isnan(metrics.loss)
    assert not metrics.finite


def test_a_compiled_step_depends_only_on_what_changes_it():
    """Neither where a run writes, nor its seed, its length or its learning rate compile anew.

    What is not traced again is not compiled again.
    """

    def traced(**flags) -> bool:
        config = TrainConfig.of(**{"batch_size": ROWS} | flags)
        create_state = state_maker(SHAPE, optimizer(config.optimizer), None)
        rate = learning_rate(config.optimizer, config.run.steps or 5)(0)
        state = mesh.placed(jax.eval_shape(create_state, config.run.seed), None)
        with mock.patch.object(step, "loss_sum", side_effect=loss_sum) as used:
            train_step.trace(state, make_batch(), rate, config.loss, config.step)
        return used.called

    assert traced()
    for flags in (
        {"out": Path("elsewhere"), "seed": 7, "log_every": 3, "keep": 9, "eval_every": 2},
        {"learning_rate": 1e-5, "schedule": "linear", "warmup_steps": 2, "steps": 77},
        {"data": (Path("other.jsonl"),), "held_out": 0.5},
    ):
        assert not traced(**flags), flags
    assert traced(label_smoothing=0.2)
