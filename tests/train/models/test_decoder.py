"""The decoder: against a float64 reference in numpy, and what attention may and may not see."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.models.attention import apply_rope, rope_rotation
from train.models.cache import Cache
from train.models.config import PRESETS, LayerKind, ModelConfig, Rope
from train.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = ModelConfig(
    vocab_size=61, hidden_size=24, layers=2, heads=6, kv_heads=2, head_size=8, mlp_size=40
)


@functools.cache
def weights() -> nnx.State:
    """Random in every leaf: a new model's blocks add nothing, and would hide what they do."""

    @jax.jit
    def create(key):
        leaves, tree = jax.tree.flatten(nnx.state(Decoder(SHAPE, rngs=nnx.Rngs(params=key))))
        keys = jax.random.split(key, len(leaves))
        noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, [x + y for x, y in zip(leaves, noise, strict=True)])

    return create(jax.random.key(1))


def make_model(**changes) -> Decoder:
    """The same weights in a model that differs in how it computes."""
    return nnx.merge(nnx.graphdef(abstract(dataclasses.replace(SHAPE, **changes))), weights())


def abstract(shape: ModelConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(params=0)))


def packed(lengths: list[list[int]], length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of random tokens; `lengths[row]` are the lengths of a row's segments."""
    random = np.random.default_rng(seed)
    segments = np.zeros((len(lengths), length), np.int32)
    positions = np.zeros_like(segments)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes, start=1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    tokens = random.integers(0, SHAPE.vocab_size, segments.shape, dtype=np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


@jax.jit
def hidden_states(model: Decoder, batch: dict[str, np.ndarray], dropout_key=None) -> jax.Array:
    return model(**batch, dropout_key=dropout_key)


@jax.jit
def logits(model: Decoder, batch: dict[str, np.ndarray]) -> jax.Array:
    return model(**batch) @ model.head.T


def reference_hidden(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """The hidden states of one unpacked sequence, float64, head by head and pair by pair."""
    weight = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.state(model))
    config = model.config

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale

    def rotate(x):
        pairs = x[:, : config.head_size // 2] + 1j * x[:, config.head_size // 2 :]
        speed = config.rope.theta ** (-2 * np.arange(pairs.shape[1]) / config.head_size)
        pairs = pairs * np.exp(1j * np.arange(len(x))[:, None] * speed)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    def columns(x, head):
        return x[:, head * config.head_size : (head + 1) * config.head_size]

    x = weight["embedding"]["embedding"][...][tokens]
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), k=1)
    for layer in range(config.layers):
        block = weight["blocks"]
        kernel = {
            name: values["kernel"][layer]
            for part in ("attention", "mlp")
            for name, values in block[part].items()
        }
        normed = norm(x, block["attention_norm"]["scale"][layer])
        query, key, value = (normed @ kernel[name] for name in ("query", "key", "value"))
        mixed = []
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            scores = rotate(columns(query, head)) @ rotate(columns(key, shared)).T
            scores = np.exp(scores / np.sqrt(config.head_size) + future)
            mixed.append(scores / scores.sum(axis=1, keepdims=True) @ columns(value, shared))
        x = x + np.concatenate(mixed, axis=1) @ kernel["out"]
        normed = norm(x, block["mlp_norm"]["scale"][layer])
        gate = normed @ kernel["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ kernel["up"])) @ kernel["down"]
    return norm(x, weight["norm"]["scale"][...])


def test_hidden_states_are_those_of_the_float64_reference_for_every_packed_segment():
    model = make_model()
    batch = packed([[7, 5], [13]], length=13, seed=3)
    hidden = np.asarray(hidden_states(model, batch))
    assert hidden.dtype == np.float32
    for row, start, end in ((0, 0, 7), (0, 7, 12), (1, 0, 13)):
        expected = reference_hidden(model, batch["tokens"][row, start:end])
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(hidden[row, start:end], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_changing_one_segment_leaves_the_logits_of_the_others_bit_identical(dtype, changed):
    model = make_model(dtype=dtype)
    batch = packed([[5, 9, 3], [17, 2]], length=20)
    inside = (batch["segments"] == changed) & (np.arange(2)[:, None] == 0)
    tokens = np.where(inside, (batch["tokens"] + 7) % SHAPE.vocab_size, batch["tokens"])
    before = np.asarray(logits(model, batch)).astype(np.float32)
    after = np.asarray(logits(model, batch | {"tokens": tokens})).astype(np.float32)
    assert inside.any()
    assert (before[inside] != after[inside]).any(axis=-1).all()
    np.testing.assert_array_equal(before[~inside], after[~inside])


def test_a_token_does_not_see_those_after_it():
    model = make_model()
    batch = packed([[20]], length=20)
    tokens = batch["tokens"].copy()
    tokens[0, 11] = (tokens[0, 11] + 1) % SHAPE.vocab_size
    before, after = logits(model, batch), logits(model, batch | {"tokens": tokens})
    np.testing.assert_array_equal(before[0, :11], after[0, :11])
    assert (np.asarray(before)[0, 11:] != np.asarray(after)[0, 11:]).any(axis=-1).all()


def test_rope_scores_depend_on_the_distance_alone():
    random = np.random.default_rng(0)
    query, key = (random.normal(size=(1, 1, 1, 8)).astype(np.float32) for _ in range(2))

    def score(query_position: int, key_position: int) -> float:
        turned = [
            apply_rope(jnp.asarray(x), rope_rotation(jnp.array([[position]]), 8, Rope(1e4)))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_dropout_needs_a_key_and_depends_on_it():
    model = make_model(dropout=0.5)
    batch = packed([[20]], length=20)
    keys = jax.random.split(jax.random.key(0))
    one, again, other = (hidden_states(model, batch, keys[i]) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=0.1)
    off = hidden_states(model, batch)
    assert not np.allclose(one, off, atol=0.1)
    without = make_model(dropout=0.0)
    np.testing.assert_array_equal(off, hidden_states(without, batch, keys[0]))


@pytest.mark.slow
def test_neither_loops_nor_remat_change_loss_or_gradient():
    batch = packed([[9, 8]], length=20)

    def loss_and_gradient(model: Decoder):
        def loss(model: Decoder) -> jax.Array:
            return jnp.sum(jnp.sin(model(**batch, dropout_key=jax.random.key(3))))

        return jax.jit(jax.value_and_grad(loss))(model)

    ways = [{"scan": "off"}, *({"remat": remat} for remat in ("none", "block", "full"))]
    kept, *others = (
        jax.tree.leaves(loss_and_gradient(make_model(dropout=0.1, **way))) for way in ways
    )
    assert all(np.abs(one).max() > 1e-3 for one in kept)
    for other in others:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), kept, other
        )


def test_layers_that_are_written_out_are_traced_once_for_each_kind():
    """Else a step of many layers takes seconds to trace, in every process."""
    batch = packed([[9, 8]], length=20)

    def products(layers: int) -> int:
        shape = dataclasses.replace(
            SHAPE, layers=layers, window=4, sliding=(True, False) * (layers // 2), scan="off"
        )
        gradient = jax.jit(jax.grad(lambda model: jnp.sum(model(**batch))))
        return gradient.lower(abstract(shape)).as_text().count("dot_general")

    assert products(8) == products(4) > 20


def test_an_embedding_is_scaled_by_what_its_dtype_holds():
    """As transformers does it: √640 is 25.298, and 25.25 in bfloat16."""
    shape = ModelConfig(
        vocab_size=3, hidden_size=640, layers=1, heads=1, kv_heads=1, head_size=2, mlp_size=1,
        scaled_embedding=True,
    )  # fmt: skip
    for dtype, scale in (("float32", 640**0.5), ("bfloat16", 25.25)):
        here = dataclasses.replace(shape, dtype=dtype)
        model = nnx.eval_shape(lambda here=here: Decoder(here, rngs=nnx.Rngs(0)))
        model.embedding.embedding = nnx.Param(jnp.ones((3, 640)))
        embedded = model._embed(jnp.array([[1]]))
        assert embedded.dtype == dtype
        np.testing.assert_allclose(embedded.astype(jnp.float32), scale, rtol=1e-7)


def test_bfloat16_computes_in_bfloat16_on_float32_weights():
    model = make_model(dtype="bfloat16")
    batch = packed([[20]], length=20)
    hidden = hidden_states(model, batch)
    assert hidden.dtype == model.head.dtype == jnp.bfloat16

    @jax.jit
    @jax.grad
    def gradient_of(model: Decoder) -> jax.Array:
        return jnp.sum(model(**batch).astype(jnp.float32) ** 2)

    gradient = gradient_of(model)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(model) + jax.tree.leaves(gradient)}
    assert dtypes == {np.dtype(np.float32)}
    expected = hidden_states(make_model(), batch)
    error = np.abs(hidden.astype(jnp.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_the_head_is_the_embedding_unless_it_is_untied():
    tied, untied = abstract(SHAPE), abstract(dataclasses.replace(SHAPE, tied_head=False))
    table = (SHAPE.vocab_size, SHAPE.hidden_size)
    assert size(nnx.state(untied)) - size(nnx.state(tied)) == np.prod(table)
    for model in (tied, untied):
        nnx.update(model, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nnx.state(model)))
        model.embedding.embedding[...] = jnp.full(table, 2.0)
    untied.untied_head[...] = jnp.full(table, 3.0)
    np.testing.assert_array_equal(tied.head, np.full(table, 2.0))
    np.testing.assert_array_equal(untied.head, np.full(table, 3.0))


def test_smollm2_has_its_published_number_of_parameters():
    shape = PRESETS["smollm2-135m"]
    assert size(nnx.state(abstract(shape))) == 134_515_008


@pytest.mark.parametrize(
    ("changes", "message"), [({"kv_heads": 4}, "self.kv_heads=4"), ({"head_size": 7}, "even")]
)
def test_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHAPE, **changes)


def size(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def test_a_new_model_passes_its_embedding_on_and_its_logits_are_small():
    model = Decoder(SHAPE, rngs=nnx.Rngs(params=0))
    batch = packed([[20]], length=20)
    hidden = np.asarray(hidden_states(model, batch))
    embedded = np.asarray(model.embedding.embedding[...])[batch["tokens"]]
    norm = np.sqrt(np.mean(embedded**2, axis=-1, keepdims=True) + SHAPE.norm_epsilon)
    np.testing.assert_allclose(hidden, embedded / norm, rtol=1e-4)
    assert 0.4 < np.std(hidden @ np.asarray(model.head).T) < 0.8


GEMMA = dataclasses.replace(
    SHAPE,
    layers=5,  # two repetitions of sliding, full; and a sliding one
    sliding=(True, False, True, False, True),
    window=4,
    local_rope=Rope(100.0),
    post_norms=True,
    qk_norms=True,
    qkv_bias=True,
    zero_centred_norms=True,
    attention_softcap=5.0,
    scaled_embedding=True,
    activation="gelu_tanh",
)


def random_model(config: ModelConfig) -> Decoder:
    graphdef, abstract_state = nnx.split(abstract(config))
    random = np.random.default_rng(5)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda x: 0.3 * random.normal(size=x.shape).astype(x.dtype), abstract_state),
    )


@pytest.mark.parametrize("config", [SHAPE, GEMMA], ids=["one kind", "two kinds"])
@pytest.mark.parametrize("remat", ["block", "full"])
def test_with_remat_the_forward_pass_keeps_no_copy_of_the_weights(config, remat):
    sliding = config.sliding and config.sliding[:2] * 2
    changes = {"layers": 4, "mlp_size": 4000, "sliding": sliding, "remat": remat}
    graphdef, params = nnx.split(abstract(dataclasses.replace(config, **changes)))
    batch = packed([[20]], length=20)

    def forward(params: nnx.State):
        return jax.vjp(lambda params: nnx.merge(graphdef, params)(**batch), params)

    (loop,) = (e for e in jax.make_jaxpr(forward)(params).eqns if e.primitive.name == "scan")
    kept = sum(out.aval.size for out in loop.outvars)
    stream = 20 * config.hidden_size
    assert 2 * stream < kept < 0.1 * size(params)


@pytest.mark.parametrize("config", [SHAPE, GEMMA], ids=["llama", "all options"])
def test_tokens_added_to_a_cache_give_what_the_whole_row_gives(config):
    model = random_model(config)
    batch = packed([[3, 9], [12]], length=12)
    batch["segments"][0] = np.where(batch["segments"][0] == 1, 0, 1)  # padding on the left
    expected = np.asarray(hidden_states(model, batch))
    extend = jax.jit(lambda model, part, cache: model.extend(**part, cache=cache))
    cache, hidden = Cache.empty(config, rows=2, size=16), []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        part = {name: array[:, start:end] for name, array in batch.items()}
        states, cache = extend(model, part, cache)
        hidden.append(np.asarray(states))
    assert int(cache.length) == 12
    np.testing.assert_allclose(np.concatenate(hidden, axis=1), expected, rtol=1e-4, atol=1e-5)


def test_a_sliding_layer_sees_its_window_and_no_more():
    model = random_model(dataclasses.replace(GEMMA, layers=1, sliding=(True,)))
    batch = packed([[20]], length=20)
    tokens = batch["tokens"].copy()
    tokens[0, 7] = (tokens[0, 7] + 1) % SHAPE.vocab_size
    before = np.asarray(hidden_states(model, batch))
    after = np.asarray(hidden_states(model, batch | {"tokens": tokens}))
    changed = (before != after).any(axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(changed), [7, 8, 9, 10])


def test_the_pattern_is_the_shortest_that_repeats():
    assert len(SHAPE.pattern) == 1
    assert GEMMA.pattern == GEMMA.kinds[:2]
    assert GEMMA.kinds[0] == LayerKind(Rope(100.0), 4)
    assert len(PRESETS["gemma3-270m"].pattern) == 6
    with pytest.raises(ValueError, match=r"5 must be self\.layers=2"):
        dataclasses.replace(SHAPE, sliding=GEMMA.sliding)
    with pytest.raises(ValueError, match=r"self\.window=None"):
        dataclasses.replace(GEMMA, window=None)
