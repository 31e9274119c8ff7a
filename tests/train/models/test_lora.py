"""Adapters: what they compute, that they begin as nothing, and that merging changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.config import TrainConfig
from train.models import lora
from train.models.config import ADAPTED, Lora, ModelConfig
from train.models.decoder import Block, Decoder
from train.run.options import LossOptions, StepOptions, TrainedOptions
from train.run.state import state_maker
from train.run.step import train_step
from train.run.trained import divide, frozen

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BASE = ModelConfig(
    vocab_size=61, hidden_size=24, layers=2, heads=6, kv_heads=2, head_size=8, mlp_size=40
)
ADAPTERS = Lora(rank=3, alpha=6.0, targets=ADAPTED)
SHAPE = dataclasses.replace(BASE, lora=ADAPTERS)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9), dtype=np.int32)
WHERE = np.ones_like(TOKENS), np.broadcast_to(np.arange(9, dtype=np.int32), TOKENS.shape)


def made(shape: ModelConfig) -> nnx.State:
    return jax.jit(lambda: nnx.state(Decoder(shape, rngs=nnx.Rngs(params=1))))()


def noisy(params: nnx.State) -> nnx.State:
    """Random in every leaf: new adapters and new blocks add nothing, and would hide faults."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    noise = [0.2 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, [x + y for x, y in zip(leaves, noise, strict=True)])


def logits(shape: ModelConfig, params: nnx.State) -> np.ndarray:
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(params=0))))

    @jax.jit
    def compute(params):
        model = nnx.merge(graph, params)
        with jax.default_matmul_precision("highest"):
            return model(TOKENS, *WHERE) @ model.head.T

    return np.asarray(compute(params))


def test_new_adapters_change_neither_the_other_weights_nor_what_is_computed():
    base, adapted = made(BASE), made(SHAPE)
    flat = dict(nnx.to_flat_state(adapted))
    for path, weight in nnx.to_flat_state(base):
        np.testing.assert_array_equal(flat[path][...], weight[...])
    np.testing.assert_array_equal(logits(SHAPE, adapted), logits(BASE, base))
    drawn = {path: leaf[...] for path, leaf in flat.items() if path[-1] == "a"}
    assert len(drawn) == len(ADAPTED)
    for path, a in drawn.items():
        bound = np.sqrt(1 / a.shape[-2])
        assert 0.8 * bound < np.abs(a).max() <= bound, path
        if a.ndim == 3:
            assert np.abs(a[0] - a[1]).max() > 0.1 * bound  # each layer has its own


@pytest.mark.parametrize(
    ("targets", "tied_head"),
    [(ADAPTED, True), (ADAPTED, False), (("attention.key", "mlp.down"), True)],
)
def test_merged_weights_compute_what_adapters_add(targets, tied_head):
    adapters = dataclasses.replace(ADAPTERS, targets=targets)
    shape = dataclasses.replace(SHAPE, lora=adapters, tied_head=tied_head)
    params = noisy(made(shape))
    plain, weights = lora.merged(shape, params)
    assert plain.lora is None
    assert plain.tied_head == (tied_head and "head" not in targets)
    found = logits(shape, params)
    np.testing.assert_allclose(found, logits(plain, weights), rtol=1e-4, atol=1e-4)
    flat = nnx.to_flat_state(params)
    without = nnx.from_flat_state([(p, leaf) for p, leaf in flat if p[-1] not in ("a", "b")])
    unadapted = dataclasses.replace(shape, lora=None)
    assert np.abs(found - logits(unadapted, without)).max() > 0.05


def test_the_head_s_adapter_is_more_columns_of_both_sides():
    shape = dataclasses.replace(SHAPE, lora=dataclasses.replace(ADAPTERS, targets=("head",)))
    params = noisy(made(shape))
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(params=0))))
    model = nnx.merge(graph, params)
    hidden, head = model(TOKENS, *WHERE), model.head
    assert hidden.shape[-1] == head.shape[-1] == shape.head_columns == 64
    h, a, b = (
        np.asarray(x, np.float64)
        for x in (hidden[..., :24], model.head_adapter.a[...], model.head_adapter.b[...])
    )
    expected = h @ np.asarray(head[:, :24], np.float64).T + 2.0 * (h @ a) @ b
    found = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(head[:, 27:], 0.0)


def test_an_adapter_drops_features_of_what_it_reads_and_draws_them_again_for_the_gradient():
    """x·A of A = 1 shows which are left, divided by their probability."""
    x, b = np.random.default_rng(2).standard_normal((2, 500, 8), np.float32)
    b, key = b[:, :5][:8], jax.random.key(3)

    def keyed(a, key):
        adapter = lora.Adapter(Lora(8, 16.0, (), dropout=0.25), 8, 5, rngs=nnx.Rngs(0))
        adapter.a, adapter.b = nnx.Param(a), nnx.Param(b)
        return lora.with_dropout(adapter, key)

    one = jnp.eye(8)
    seen = np.asarray(keyed(one, key).down(x))
    kept = seen != 0
    assert 0.2 < 1 - kept.mean() < 0.3
    np.testing.assert_allclose(seen, np.where(kept, x / 0.75, 0), rtol=1e-6)
    other = np.asarray(keyed(one, jax.random.key(4)).down(x))
    assert 0.3 < ((other != 0) != kept).mean() < 0.45  # 2 · ¼ · ¾ of two draws
    np.testing.assert_array_equal(keyed(one, None).down(x), x)
    gradient = jax.grad(lambda a: jnp.sum(keyed(a, key).down(x) * x))(one)
    np.testing.assert_allclose(gradient, seen.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(keyed(one, key)(x), 2 * seen @ b, atol=1e-4)


def test_only_what_adapters_read_is_dropped_and_each_has_its_own_draw():
    shape = dataclasses.replace(SHAPE, lora=dataclasses.replace(ADAPTERS, dropout=0.5))
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(params=0))))
    new = made(SHAPE)
    parts = [part for _, part in nnx.iter_modules(nnx.merge(graph, new))]
    block = next(part for part in parts if isinstance(part, Block))
    keyed = [part for _, part in nnx.iter_modules(lora.with_dropout(block, jax.random.key(0)))]
    keys = [jax.random.key_data(part.key) for part in keyed if isinstance(part, lora.Adapter)]
    assert len(np.unique(keys, axis=0)) == len(keys) == len(ADAPTED) - 1

    @jax.jit
    def hidden(params, key):
        return nnx.merge(graph, params)(TOKENS, *WHERE, dropout_key=key)

    learnt, d = noisy(new), SHAPE.hidden_size
    first, second = (hidden(new, jax.random.key(i)) for i in (0, 1))
    plain = hidden(new, None)
    np.testing.assert_array_equal(first[..., :d], plain[..., :d])  # B is 0: W's part is whole
    for one, other in ((first, second), (first, plain)):
        assert np.abs(one[..., d:] - other[..., d:]).max() > 0.1  # what the head's A reads
    assert np.abs(hidden(learnt, jax.random.key(0)) - hidden(learnt, None))[..., :d].max() > 0.1


def test_products_of_adapters_are_of_the_activations_dtype():
    shape = dataclasses.replace(SHAPE, dtype="bfloat16")
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(params=0))))
    model = jax.eval_shape(lambda params: nnx.merge(graph, params)(TOKENS, *WHERE), made(shape))
    assert model.dtype == jnp.bfloat16


def test_adapters_alone_are_trained():
    names = set(frozen(SHAPE, ()))
    assert names == {".".join(path) for path, _ in nnx.to_flat_state(made(BASE))}
    some = frozen(SHAPE, ["blocks.mlp", "blocks.attention.query.adapter.b"])
    assert set(some) - names == {
        *(f"blocks.mlp.{name}.adapter.{x}" for name in ("gate", "up", "down") for x in "ab"),
        "blocks.attention.query.adapter.b",
    }
    with pytest.raises(ValueError, match="leaves nothing to train"):
        frozen(SHAPE, ["blocks", "head_adapter"])


def test_targets_are_patterns_of_projections():
    found = TrainedOptions(lora_rank=4, lora_targets=("*.key", "head", "mlp.[gu]*")).lora
    assert found == Lora(4, 32.0, ("attention.key", "mlp.gate", "mlp.up", "head"))
    assert found.scale == 8.0
    default = TrainedOptions(lora_rank=4).lora
    assert default is not None
    assert default.targets == ADAPTED[:-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": 0}, "--lora-rank must be at least 1, not 0"),
        ({"lora_rank": 4, "lora_alpha": -1.0}, "--lora-alpha must be finite and more than 0"),
        ({"lora_rank": 4, "lora_targets": ("query",)}, "query is none of attention.query, "),
        ({"lora_rank": 4, "lora_dropout": 1.0}, r"--lora-dropout must be in \[0, 1\), not 1.0"),
        ({"lora_dropout": 0.1}, "--lora-dropout is of adapters: give --lora-rank too"),
        ({"lora_rank": 4, "lora_targets": ()}, "--lora-targets names nothing"),
        ({"lora_alpha": 8.0}, "--lora-alpha is of adapters: give --lora-rank too"),
    ],
)
def test_flags_that_make_no_adapters_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        TrainedOptions(**flags)


def test_the_defaults_of_adapters():
    flags = TrainConfig.defaults("tiny", lora=True).flags()
    assert (flags["learning_rate"], flags["weight_decay"]) == (2e-4, 0.0)
    assert TrainConfig.defaults("smollm2-135m", lora=True).optimizer.learning_rate == 2e-4


@pytest.mark.slow
def test_a_step_trains_adapters_alone_and_the_loss_is_that_of_whole_logits():
    """With bfloat16 weights beside them, which keep their bits, and one kind of A frozen."""
    shape = dataclasses.replace(SHAPE, weights="bfloat16")
    names = frozen(shape, ["*.adapter.a"])
    create = state_maker(shape, optax.identity(), None, names)
    first = create(0)
    params = jax.tree.map(lambda x, y: y.astype(x.dtype), first.params, noisy(made(SHAPE)))
    labels = np.roll(TOKENS, -1, axis=1)
    batch = {"tokens": TOKENS, "labels": labels, "segments": WHERE[0], "positions": WHERE[1]}

    def naive(params):
        model = nnx.merge(first.graphdef, params)
        z = jnp.matmul(model(TOKENS, *WHERE), model.head.T, precision="highest")
        lse = jax.nn.logsumexp(z, axis=-1)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 61), 0.1)
        return jnp.mean(lse - jnp.sum(targets * z, axis=-1) + 1e-3 * lse**2)

    expected, gradient = jax.jit(jax.value_and_grad(naive))(params)
    kept = jax.tree.map(np.asarray, params)  # the step takes the arrays
    state, loss = dataclasses.replace(first, params=params), LossOptions(z_loss=1e-3)
    after, metrics = train_step(state, batch, 1.0, loss, StepOptions(batch_size=1, accumulate=2))
    assert metrics.loss == pytest.approx(float(expected), rel=1e-5)
    (learnt, same), (before, still) = divide(after.params, names), divide(kept, names)
    jax.tree.map(np.testing.assert_array_equal, same, still)
    assert {x.dtype for x in jax.tree.leaves(learnt)} == {np.dtype("float32")}
    assert len(jax.tree.leaves(learnt)) == len(ADAPTED) + 1  # B everywhere, and the head's A
    for new, old, g in zip(
        *map(jax.tree.leaves, (learnt, before, divide(gradient, names)[0])), strict=True
    ):
        assert np.abs(g).max() > 1e-3
        np.testing.assert_allclose(old - new, g, rtol=1e-3, atol=1e-6)
