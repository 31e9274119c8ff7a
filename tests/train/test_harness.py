"""What lm-evaluation-harness is answered; itself it is not needed."""

from __future__ import annotations

import importlib
import types

import jax
import numpy as np
import pytest
from flax import nnx

from train import harness
from train.models.config import ModelConfig
from train.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = ModelConfig(
    vocab_size=31, hidden_size=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_size=24
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(SHAPE, rngs=nnx.Rngs(params=0))))
    random = np.random.default_rng(5)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), state)
    )


@jax.jit
def log_softmax(model_state, tokens, length):
    model = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Decoder(SHAPE, rngs=nnx.Rngs(params=0)))), model_state
    )
    index = np.arange(tokens.shape[0], dtype=np.int32)
    hidden = model(tokens[None], (index < length).astype(np.int32)[None], index[None])[0]
    return jax.nn.log_softmax(hidden @ model.head.T)


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_requests_and_what_is_long_loses_its_beginning(model):
    random = np.random.default_rng(0)

    def some(length: int) -> list[int]:
        return random.integers(0, SHAPE.vocab_size, length).tolist()

    a, b, long = some(5), some(7), some(30)
    pairs = [(a, some(2)), (b, some(3)), (a, some(1)), (long, some(4)), (b, some(3))]
    pairs.append(pairs[0])  # asked twice
    found = harness.likelihoods(model, pairs, max_length=20, batch_tokens=128)
    state = nnx.state(model)
    for (context, continuation), (log_prob, greedy) in zip(pairs, found, strict=True):
        whole = [*context, *continuation][-21:]  # the last token is predicted and not read
        log_p = log_softmax(state, np.pad(whole, (0, 24 - len(whole))).astype(np.int32), len(whole))
        at = np.arange(len(whole) - len(continuation) - 1, len(whole) - 1)
        expected = np.asarray(log_p)[at]
        assert log_prob == pytest.approx(expected[np.arange(len(at)), continuation].sum(), abs=1e-4)
        assert greedy == (expected.argmax(1) == continuation).all()


def test_generation_ends_before_the_first_stop():
    assert harness._until(iter(["one\n", "tw", "o\n\nthree"]), ["\n\n", "three"]) == "one\ntwo"
    assert harness._until(iter(["one"]), []) == "one"


def test_no_network_is_one_line_and_another_error_is_not_hidden(monkeypatch, capsys):
    class LocalEntryNotFoundError(FileNotFoundError):
        pass

    def ask():
        try:
            raise LocalEntryNotFoundError("no copy of it\nand more")
        except FileNotFoundError as error:
            raise KeyError("the data set") from error

    monkeypatch.setattr(harness, "register", lambda: None)
    monkeypatch.setattr(
        importlib, "import_module", lambda _: types.SimpleNamespace(cli_evaluate=ask)
    )
    assert harness.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "train.evaluate --task-data (no copy of it)" in said
    monkeypatch.setattr(
        importlib, "import_module", lambda _: types.SimpleNamespace(cli_evaluate=lambda: 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        harness.main()


def test_the_harness_s_absence_is_one_line(monkeypatch, capsys):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    assert harness.main() == 2
    assert 'pip install ".[harness]"' in capsys.readouterr().err
