"""The measurement behind `python -m train.diagnose`, against float64; its words and its picture."""

import dataclasses
import functools
import io
import math

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from lsce import theory
from train.data.packing import pack
from train.evaluation import diagnosis, diagnosis_picture, diagnosis_words
from train.models.config import PRESETS
from train.models.decoder import Decoder
from train.text.tokenizer import Example

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = dataclasses.replace(PRESETS["nano"], vocab_size=90, hidden_size=24, layers=1)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(SHAPE, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def rows():
    r = np.random.default_rng(0)
    examples = [
        Example(r.integers(0, 90, 16).astype(np.int32), np.arange(16) >= 5) for _ in range(9)
    ]
    return pack(examples, 32)


@pytest.fixture(scope="module")
def diagnosed(model, rows):
    """By softcap, each made once."""
    how = {"tokens": 70, "label_smoothing": 0.1}
    return functools.cache(lambda cap: diagnosis.diagnose(model, rows, softcap=cap, **how))


def test_variants_are_those_of_the_logits_in_float64(model, rows):
    hidden, labels = diagnosis.states(model, rows, 70)
    assert hidden.shape == (70, 24)
    head = 9 * model.head
    scales = [(1.0, None), (0.5, None), (2.0, 3.0)]
    seen = diagnosis.variants(head, hidden, labels, scales)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    for k, (t, cap) in enumerate(scales):
        z = (logits if cap is None else cap * np.tanh(logits / cap)) / t
        lp = log_softmax(z, axis=1)
        truth = {
            "nll": -lp[np.arange(70), labels],
            "confidence": np.exp(lp.max(1)),
            "entropy": -(np.exp(lp) * lp).sum(1),
            "correct": lp.argmax(1) == labels,
            "distance": z.max(1) - z.mean(1),
        }
        for name, expected in truth.items():
            np.testing.assert_allclose(getattr(seen, name)[k], expected, rtol=1e-3, atol=1e-4)
    assert np.abs(seen.entropy[0] - seen.entropy[1]).max() > 0.1


def test_the_temperature_is_that_of_the_least_nll():
    tried = diagnosis.TEMPERATURES
    nll = np.array([1 + math.log(t / 1.3) ** 2 for t in tried])
    assert diagnosis.temperature(tried, nll) == pytest.approx(1.3, abs=2e-3)
    assert diagnosis.temperature(tried, np.array(tried)) == tried[0]


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_diagnosis_holds_together(diagnosed, softcap):
    found, points = diagnosed(softcap)
    head = found.head
    assert head.lemma.norm >= head.longest.norm >= head.usual.norm > 0
    assert head.centred.norm >= head.longest.norm
    assert head.usual.entropy >= head.longest.entropy
    bound = np.asarray(theory.entropy_lower_bound(points["length"], 90))
    assert np.all(points["entropy"] >= bound * (1 - 1e-5))
    assert found.entropy.value == pytest.approx(points["entropy"].mean(), rel=1e-5)
    at_one = found.temperatures[diagnosis.TEMPERATURES.index(1.0)]
    assert at_one.nll == pytest.approx(found.nll.value, rel=1e-5)
    assert len(found.softcaps) == (len(diagnosis.SOFTCAPS) if softcap is None else 0)
    assert (found.gap.low or 0) <= found.gap.value <= (found.gap.high or 0)
    said = diagnosis_words.words(found)
    assert f"{found.tokens:,} tokens of this text" in said
    assert ("softcap of 2 alone" in said) == (softcap is not None)
    if softcap:  # e^4 / (e^4 + 89) is less than smoothing allows: the cap does its work already
        assert found.unable == 1
        assert "Not likely" in said
    picture = io.BytesIO()
    diagnosis_picture.figure("it", found, points).savefig(picture, format="png", dpi=40)
    assert picture.getvalue().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_is_said_of_smoothing_follows_the_gap(diagnosed):
    found, _ = diagnosed(None)
    found = dataclasses.replace(found, unable=0.0)
    for low, high, expected in (
        (0.1, 0.2, "Likely: "),
        (-0.2, -0.1, "Not for this model"),
        (-0.1, 0.1, "keep it so while it is fine-tuned"),
    ):
        gap = dataclasses.replace(found.gap, low=low, high=high)
        assert expected in diagnosis_words.words(dataclasses.replace(found, gap=gap))
    for best, said in ((1.3, "T = 1.3,"), (2.0, "T = 2 or more,"), (0.5, "T = 0.5 or less,")):
        at = dataclasses.replace(found, temperature=best)
        assert said in diagnosis_words.words(at)


def test_too_little_text_is_an_error(model, rows):
    with pytest.raises(ValueError, match=r"1 token\(s\) to predict"):
        diagnosis.diagnose(model, rows, tokens=1, softcap=None, label_smoothing=0.1)
    assert jax.numpy.isfinite(diagnosis.states(model, rows, 1)[0]).all()
