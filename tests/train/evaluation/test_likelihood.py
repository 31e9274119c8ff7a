"""Log-likelihoods of trees against each context and continuation alone, with every logit."""

import jax
import numpy as np
import pytest
from flax import nnx

from train.evaluation import likelihood
from train.evaluation.likelihood import Tree, log_likelihoods
from train.models.config import ModelConfig, Rope
from train.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    layers=3,
    heads=2,
    kv_heads=1,
    head_size=8,
    mlp_size=40,
    sliding=(True, False, True),
    window=7,
    local_rope=Rope(100.0),
    final_softcap=3.0,
    attention_softcap=5.0,
    dropout=0.5,
)
LONGEST = 64


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Random in every leaf, and with logits that the softcap bends."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(SHAPE, rngs=nnx.Rngs(params=0))))
    random = np.random.default_rng(5)
    leaves = jax.tree.map(lambda x: 0.5 * random.normal(size=x.shape).astype(x.dtype), state)
    return nnx.merge(graphdef, leaves)


def some_trees(count: int, seed: int, beginning: int = 0) -> list[Tree]:
    random = np.random.default_rng(seed)

    def some(length: int) -> list[int]:
        return random.integers(0, SHAPE.vocab_size, length).tolist()

    shared = some(beginning)
    return [
        Tree(
            shared + some(random.integers(1, 12)),
            [some(random.integers(1, 6)) for _ in range(random.integers(2, 6))],
        )
        for _ in range(count)
    ]


@nnx.jit
def forward(model: Decoder, tokens, segments, positions):
    return model(tokens, segments, positions)


def naive(model: Decoder, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """A row for each continuation, whole, and the softmax of all its logits in float64."""
    totals, greedy = [], []
    for continuation in tree.continuations:
        whole = [*tree.context, *continuation]
        row = np.pad(np.array(whole, np.int32), (0, LONGEST - len(whole)))[None]
        index = np.arange(row.shape[1], dtype=np.int32)[None]
        hidden = forward(model, row, (index < len(whole)).astype(np.int32), index)
        logits = np.asarray(hidden[0], np.float64) @ np.asarray(model.head, np.float64).T
        logits = SHAPE.final_softcap * np.tanh(logits / SHAPE.final_softcap)
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        at = np.arange(len(tree.context) - 1, len(whole) - 1)
        totals.append(log_p[at, continuation].sum())
        greedy.append((log_p[at].argmax(1) == continuation).all())
    return np.array(totals), np.array(greedy)


def all_of(batches) -> dict[int, likelihood.Likelihood]:
    found = {}
    for batch in batches:
        assert not found.keys() & batch.keys()
        found |= batch
    return found


@pytest.mark.slow
def test_every_tree_is_scored_as_if_each_continuation_were_alone(model, monkeypatch):
    """With and without a shared beginning, longer than the window, beside each other."""
    monkeypatch.setattr(likelihood, "SHORTEST", 32)
    monkeypatch.setattr(likelihood, "FEWEST_TARGETS", 32)
    trees = some_trees(7, seed=0) + some_trees(5, seed=1, beginning=33)
    trees += some_trees(3, seed=2, beginning=45) + some_trees(1, seed=3)
    likeliest = naive(model, Tree(trees[0].context, [[v] for v in range(SHAPE.vocab_size)]))[1]
    trees[0] = Tree(trees[0].context, [[int(likeliest.argmax())], [3, 4], [3]])
    groups = ["none"] * 7 + ["a"] * 5 + ["b"] * 3 + ["alone"]
    found = all_of(log_likelihoods(model, trees, groups, batch_tokens=100))
    assert sorted(found) == list(range(16))
    for i, tree in enumerate(trees):
        total, greedy = naive(model, tree)
        np.testing.assert_allclose(found[i].log_prob, total, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found[i].greedy, greedy)
    assert found[0].greedy.tolist() == [True, False, False]
    beginnings = {len(b.prefix) for b in likelihood.plan(trees, groups, 100)}
    assert beginnings == {0, 33, 45}


def test_batches_hold_every_tree_once_in_few_shapes():
    trees = some_trees(200, seed=4) + some_trees(100, seed=5, beginning=300)
    groups = [0] * 200 + [1] * 100
    batches = list(likelihood.plan(trees, groups, 1024))
    assert sorted(i for batch in batches for i in batch.trees) == list(range(300))
    assert {batch.past_size for batch in batches} == {0, 384}
    assert len({(b.past_size, b.rows, b.length) for b in batches}) <= 2
    for batch in batches:
        assert batch.rows * batch.length <= 1024
        assert batch.rows * (batch.length + batch.past_size) <= 4 * 1024
        assert len(batch.trees) <= batch.rows
        for tree in batch.trees.values():
            own = len(tree.context) - len(batch.prefix)
            assert own >= 1
            assert own + sum(len(c) - 1 for c in tree.continuations) <= batch.length


def test_sizes_are_powers_of_two_and_halfway():
    assert [likelihood.size(n) for n in (1, 64, 65, 96, 97, 128, 129, 300, 385, 1025)] == [
        *(64, 64, 96, 96, 128, 128, 192, 384, 512, 1536)
    ]
    assert [likelihood.size(n, many=True) for n in (1, 256, 257, 385, 1025)] == [
        *(256, 256, 512, 512, 2048)
    ]


def test_a_common_beginning_leaves_every_context_a_token():
    assert likelihood.common_beginning([[1, 2, 3], [1, 2, 4]]) == [1, 2]
    assert likelihood.common_beginning([[1, 2], [1, 2]]) == [1]
    assert likelihood.common_beginning([[1, 2, 3], [1, 2], [1, 2, 5]]) == [1]
    assert likelihood.common_beginning([[1, 2], [3, 4]]) == []


def test_what_has_no_tokens_is_refused(model):
    for tree in (Tree([], [[1]]), Tree([1], [[1], []])):
        with pytest.raises(ValueError, match="tree 0 has an empty"):
            next(log_likelihoods(model, [tree], [0], batch_tokens=8))


def test_other_weights_of_the_same_shape_need_no_other_programs(model, monkeypatch):
    trees = some_trees(3, seed=9)
    found = {}
    for name, weights in (("one", model), ("other", jax.tree.map(lambda x: 0.9 * x, model))):
        answers = log_likelihoods(weights, trees, [0] * 3, batch_tokens=2048)
        found[name] = [likelihood for batch in answers for likelihood in batch.values()]
        monkeypatch.setattr(likelihood, "_hidden", None)  # nothing is compiled from here on
    assert all(np.all(a.log_prob != b.log_prob) for a, b in zip(*found.values(), strict=True))


@pytest.mark.parametrize(
    ("count", "rows", "filled"),
    [
        (1, 1, 256),
        (256, 1, 256),
        (257, 1, 512),
        (1025, 1, 2048),
        (257, 128, 1024),
        (4097, 128, 16384),
    ],
)
def test_predictions_are_filled_up_to_few_sizes(count, rows, filled):
    batch = likelihood.Batch((), {0: Tree([1], [[1] * count])}, rows, 64, 0)
    assert likelihood._targets(batch) == filled
