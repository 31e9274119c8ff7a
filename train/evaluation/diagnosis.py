"""How concentrated a model's head can be, how concentrated it is, and what that says of smoothing.

`diagnose` measures, with the bounds of `lsce.theory`; `diagnosis_words` says what was found, and
`diagnosis_picture` draws it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsce import calibration, theory
from train.data.packing import IGNORE, Rows
from train.evaluation.measures import BINS
from train.evaluation.results import Measure
from train.models.decoder import Decoder

ROWS_AT_ONCE = 4
TOKENS_AT_ONCE = 64
"""Tokens whose logits are in memory at a time."""
TEMPERATURES = (0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
SOFTCAPS = (5.0, 10.0, 15.0, 30.0)
RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class Reach:
    """What logits of a length can do at most."""

    norm: float
    """The length, ‖z‖₂ or ‖z − z̄‖₂."""
    entropy: float
    """Least entropy, nats."""
    confidence: float
    """Greatest probability of a token."""

    @classmethod
    def of(cls, norm: float, vocab_size: int) -> Reach:
        entropy = theory.entropy_lower_bound(norm, vocab_size)
        return cls(norm, float(entropy), float(theory.confidence_upper_bound(norm, vocab_size)))


@dataclasses.dataclass(frozen=True)
class Head:
    """The head, and how far it reaches from the hidden states that were seen."""

    vocab_size: int
    hidden_size: int
    softcap: float | None
    sigma_c: float
    """Largest singular value of the head."""
    sigma_c_centred: float
    """The same of the head less its mean row."""
    sigma_h: float
    """Length of the longest hidden state."""
    lemma: Reach
    """At σ_C·σ_h (Lemma 4.1)."""
    centred: Reach
    """At the centred σ_C times σ_h: tighter, and as true."""
    longest: Reach
    """At the longest centred logits that were seen."""
    usual: Reach
    """At their median length."""
    capped: Reach | None
    """What the softcap alone allows; `norm` is the cap."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """The same predictions with other logits."""

    temperature: float
    softcap: float | None
    nll: float
    confidence: float
    entropy: float
    ece: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found, in nats and shares."""

    tokens: int
    nll: Measure
    accuracy: Measure
    confidence: Measure
    gap: Measure
    """confidence − accuracy."""
    ece: Measure
    entropy: Measure
    """Mean of the tokens' entropies."""
    distance: float
    """Mean of (1/V) Σ_v (z_max − z_v): what smoothing shortens."""
    head: Head
    label_smoothing: float
    target: theory.SmoothedTarget
    """What smoothing by that asks for, of a model that is sure."""
    unable: float
    """Share of the tokens whose logits are too short for the target's confidence, whatever way
    they point."""
    temperature: float
    """The best for half of the tokens."""
    before: Variant
    """The other half as they are."""
    after: Variant
    """The other half at that temperature."""
    temperatures: tuple[Variant, ...]
    softcaps: tuple[Variant, ...]


class TokenFields(NamedTuple):
    """What K variants make of each of n tokens."""

    nll: Float[Any, "K n"]
    confidence: Float[Any, "K n"]
    entropy: Float[Any, "K n"]
    correct: Float[Any, "K n"]
    distance: Float[Any, "K n"]


def diagnose(
    model: Decoder,
    rows: Rows,
    *,
    tokens: int,
    softcap: float | None,
    label_smoothing: float,
) -> tuple[Diagnosis, dict[str, np.ndarray]]:
    """Measures a model on the first `tokens` labelled tokens of packed rows.

    Returns what was found, and the length and entropy of each token for the picture. Raises
    ValueError where fewer than two tokens have a label.
    """
    hidden, labels = states(model, rows, tokens)
    n, v = len(labels), model.head.shape[0]
    if n < 2:
        raise ValueError(f"the text has {n} token(s) to predict: give more of it")
    scales = [(t, softcap) for t in TEMPERATURES]
    scales += [(1.0, cap) for cap in SOFTCAPS if softcap is None or cap < softcap]
    seen = variants(model.head, hidden, labels, scales)
    as_is = TokenFields(*(field[TEMPERATURES.index(1.0)] for field in seen))

    half = np.arange(n) % 2 == 0
    best = temperature(TEMPERATURES, seen.nll[: len(TEMPERATURES), half].mean(axis=1))
    fitted = variants(model.head, hidden, labels, [(best, softcap)])
    at_best = TokenFields(*(field[0] for field in fitted))

    lengths = np.asarray(theory.logit_norms(hidden, model.head))
    target = theory.smoothed_target(label_smoothing, v)
    reach = np.asarray(theory.confidence_upper_bound(lengths, v))
    if softcap is not None:
        reach = np.minimum(reach, theory.softcap_confidence_bound(softcap, v))
    found = Diagnosis(
        tokens=n,
        **_measures(as_is),
        distance=float(as_is.distance.mean()),
        head=_head(model, hidden, lengths, softcap),
        label_smoothing=label_smoothing,
        target=target,
        unable=float((reach < target.confidence).mean()),
        temperature=best,
        before=_variant((1.0, softcap), _part(as_is, ~half)),
        after=_variant((best, softcap), _part(at_best, ~half)),
        temperatures=tuple(
            _variant(scale, TokenFields(*(field[k] for field in seen)))
            for k, scale in enumerate(scales[: len(TEMPERATURES)])
        ),
        softcaps=tuple(
            _variant(scale, TokenFields(*(field[k] for field in seen)))
            for k, scale in enumerate(scales)
            if k >= len(TEMPERATURES)
        ),
    )
    return found, {"length": lengths, "entropy": as_is.entropy}


def states(
    model: Decoder, rows: Rows, tokens: int
) -> tuple[Float[Array, "n D"], Int[np.ndarray, " n"]]:
    """Hidden states and labels of the first `tokens` positions that have a label."""
    graphdef, params = nnx.split(model)
    hidden, labels, left = [], [], tokens
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        where = np.argwhere(batch["labels"] != IGNORE)[: max(left, 0)].T
        left -= where.shape[1]
        missing = ROWS_AT_ONCE - len(batch["tokens"])
        padded = {name: jnp.pad(x, ((0, missing), (0, 0))) for name, x in batch.items()}
        hidden.append(_hidden(graphdef, params, padded)[tuple(where)])
        labels.append(batch["labels"][tuple(where)])
        if left <= 0:
            break
    if not labels:
        return jnp.zeros((0, model.config.hidden_size)), np.zeros(0, np.int32)
    return jnp.concatenate(hidden).astype(jnp.float32), np.concatenate(labels)


@functools.partial(jax.jit, static_argnames="graphdef")
def _hidden(graphdef, params, batch) -> Float[Array, "B T D"]:
    model = nnx.merge(graphdef, params)
    return model(batch["tokens"], batch["segments"], batch["positions"], batch.get("starts"))


def variants(
    head: Float[Array, "V D"],
    hidden: Float[Array, "n D"],
    labels: Int[np.ndarray, " n"],
    scales: Sequence[tuple[float, float | None]],
) -> TokenFields:
    """The predictions under each (temperature, softcap): z' = c·tanh(z/c) / T.

    All from one product with the head, of a few tokens at a time.
    """
    temperatures = jnp.array([t for t, _ in scales], jnp.float32)
    caps = jnp.array([math.inf if cap is None else cap for _, cap in scales], jnp.float32)
    n = len(labels)
    padding = -n % TOKENS_AT_ONCE
    chunks = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, TOKENS_AT_ONCE, hidden.shape[1])
    targets = jnp.pad(jnp.asarray(labels), (0, padding)).reshape(-1, TOKENS_AT_ONCE)
    fields = [
        jax.device_get(_chunk(head, chunk, target, temperatures, caps))
        for chunk, target in zip(chunks, targets, strict=True)
    ]
    return TokenFields(*(np.concatenate(part, axis=1)[:, :n] for part in zip(*fields, strict=True)))


@jax.jit
def _chunk(head, hidden, labels, temperatures, caps) -> TokenFields:
    logits = jnp.matmul(hidden, head.astype(jnp.float32).T)

    def one(scale):
        t, cap = scale
        z = jax.lax.cond(cap < jnp.inf, lambda: cap * jnp.tanh(logits / cap), lambda: logits) / t
        top = jnp.max(z, axis=1)
        lse = jax.nn.logsumexp(z, axis=1)
        target = jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]
        p = jnp.exp(z - lse[:, None])
        return TokenFields(
            nll=lse - target,
            confidence=jnp.exp(top - lse),
            entropy=lse - jnp.sum(p * z, axis=1),
            correct=(jnp.argmax(z, axis=1) == labels).astype(jnp.float32),
            distance=top - jnp.mean(z, axis=1),
        )

    return jax.lax.map(one, (temperatures, caps))


def temperature(tried: Sequence[float], nll: Float[np.ndarray, " K"]) -> float:
    """Where the parabola through the lowest of the NLLs, over log T, has its minimum."""
    k = int(np.clip(np.argmin(nll), 1, len(tried) - 2))
    a, b, _ = np.polyfit(np.log(tried[k - 1 : k + 2]), nll[k - 1 : k + 2].astype(np.float64), 2)
    low, high = math.log(tried[k - 1]), math.log(tried[k + 1])
    best = -b / (2 * a) if a > 0 else math.log(tried[int(np.argmin(nll))])
    return round(math.exp(min(max(best, low), high)), 3)


def _measures(seen: TokenFields) -> dict[str, Measure]:
    key = jax.random.key(0)

    def mean(values: np.ndarray) -> Measure:
        return _interval(jnp.mean, values, method="percentile")

    def _interval(metric, *arrays: np.ndarray, method) -> Measure:
        low, value, high = calibration.bootstrap_interval(
            metric, *arrays, key=key, samples=RESAMPLES, method=method
        )
        return Measure(float(value), float(low), float(high))

    pair = seen.confidence, seen.correct
    ece = _interval(calibration.expected_calibration_error, *pair, method="basic")
    return {
        "nll": mean(seen.nll),
        "accuracy": mean(seen.correct),
        "confidence": mean(seen.confidence),
        "gap": mean(seen.confidence - seen.correct),
        "ece": dataclasses.replace(ece, low=max(ece.low or 0.0, 0.0)),
        "entropy": mean(seen.entropy),
    }


def _variant(scale: tuple[float, float | None], seen: TokenFields) -> Variant:
    ece = calibration.expected_calibration_error(seen.confidence, seen.correct, bins=BINS)
    means = (float(x.mean()) for x in (seen.nll, seen.confidence, seen.entropy))
    return Variant(*scale, *means, ece=float(ece))


def _part(seen: TokenFields, of: np.ndarray) -> TokenFields:
    return TokenFields(*(field[of] for field in seen))


def _head(
    model: Decoder, hidden: Float[Array, "n D"], lengths: np.ndarray, softcap: float | None
) -> Head:
    v, width = model.head.shape
    sigma_c = float(theory.spectral_norm(model.head))
    centred = float(theory.spectral_norm(model.head, centred=True))
    sigma_h = float(jnp.max(jnp.linalg.norm(hidden, axis=1)))
    capped = None
    if softcap is not None:
        entropy = theory.softcap_entropy_bound(softcap, v)
        capped = Reach(softcap, entropy, theory.softcap_confidence_bound(softcap, v))
    return Head(
        vocab_size=v,
        hidden_size=width,
        softcap=softcap,
        sigma_c=sigma_c,
        sigma_c_centred=centred,
        sigma_h=sigma_h,
        lemma=Reach.of(sigma_c * sigma_h, v),
        centred=Reach.of(centred * sigma_h, v),
        longest=Reach.of(float(lengths.max()), v),
        usual=Reach.of(float(np.median(lengths)), v),
        capped=capped,
    )
