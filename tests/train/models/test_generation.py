"""What follows a prompt: the tokens of whole rows, drawn by seed, shown as whole characters."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from train.models import generation
from train.models.config import ModelConfig
from train.models.decoder import Decoder
from train.models.generation import generate, pieces

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = ModelConfig(
    vocab_size=61, hidden_size=24, layers=2, heads=6, kv_heads=2, head_size=8, mlp_size=40,
    final_softcap=30.0,
)  # fmt: skip
PROMPT = [5, 17, 3, 60, 8]


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Random in every leaf: a new model's blocks add nothing, and it would repeat its prompt."""
    params = jax.jit(lambda: nnx.state(Decoder(SHAPE, rngs=nnx.Rngs(params=0))))()
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    noise = [x + 0.3 * random.standard_normal(x.shape, np.float32) for x in leaves]
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(SHAPE, rngs=nnx.Rngs(params=0))))
    return nnx.merge(graphdef, jax.tree.unflatten(tree, noise))


def test_the_likeliest_tokens_are_those_of_whole_rows_up_to_a_stop(model):
    found = list(generate(model, PROMPT, stops=frozenset(), max_tokens=12))
    assert len(set(found)) > 3

    @jax.jit
    def logits(model, tokens, index):
        row = np.arange(32)
        hidden = model(tokens[None], (row <= index)[None].astype(np.int32), row[None])
        return hidden[0, index] @ model.head.T  # the final softcap changes no order

    tokens = list(PROMPT)
    for _ in range(12):
        row = np.zeros(32, np.int32)
        row[: len(tokens)] = tokens
        tokens.append(int(np.argmax(logits(model, row, len(tokens) - 1))))
    assert found == tokens[len(PROMPT) :]
    stop = found[5]
    options = {"stops": frozenset({stop}), "max_tokens": 12}
    assert list(generate(model, PROMPT, **options)) == found[: found.index(stop)]
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(generate(model, [], **options))


def test_a_prompt_read_in_parts_is_the_same_prompt(model, monkeypatch):
    whole = list(generate(model, PROMPT, stops=frozenset(), max_tokens=6))
    monkeypatch.setattr(generation, "FULL_CACHE", 2)
    assert list(generate(model, PROMPT, stops=frozenset(), max_tokens=6)) == whole
    assert len(set(whole)) > 2


def test_draws_depend_on_the_seed_and_keep_to_the_likeliest(model):
    def drawn(**changes) -> list[int]:
        return list(generate(model, PROMPT, stops=frozenset(), max_tokens=12, **changes))

    one = drawn(temperature=1.0, seed=1)
    assert one == drawn(temperature=1.0, seed=1)
    assert one != drawn(temperature=1.0, seed=2)
    assert drawn(temperature=1.0, top_p=1e-6, seed=1) == drawn()
    assert len(set(drawn(temperature=1e4))) > 6  # of 12: each has a draw of its own


def test_a_character_of_several_tokens_is_shown_whole():
    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    found = list(pieces(iter("né 你".encode()), decode))
    assert "".join(found) == "né 你"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)
    assert len(found) > 3
