"""How concentrated a model's head can be, how concentrated it is, and what that says of smoothing.

`diagnose` measures; `words` says what was found, `figure` draws it. The bounds are `lsce.theory`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsce import calibration, theory
from train.data.packing import IGNORE, Rows
from train.evaluation.measures import BINS, SHIFTED
from train.evaluation.results import Measure
from train.models.decoder import Decoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS_AT_ONCE = 4
TOKENS_AT_ONCE = 64
"""Of which logits are in memory at a time."""
TEMPERATURES = (0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
SOFTCAPS = (5.0, 10.0, 15.0, 30.0)
RESAMPLES = 500
INK, BLUE, RED, GREEN = "#333333", "#4c78a8", "#e45756", "#2a9d8f"


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
    """Of K variants of each of n tokens."""

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


def words(found: Diagnosis) -> str:
    """The diagnosis in plain words, a paragraph a question."""
    return "\n\n".join(
        (_can_be(found), _is(found), _smoothing(found), _temperature(found), _softcap(found))
    )


def _can_be(found: Diagnosis) -> str:
    head = found.head
    text = (
        f"How sure can this head be? It has {head.vocab_size:,} tokens over {head.hidden_size}"
        f" features. At σ_C = {head.sigma_c:.4g} and hidden states of length up to"
        f" {head.sigma_h:.4g}, logits can be as long as {head.lemma.norm:.4g}; such logits could"
        f" reach {_sure(head.lemma)}. The longest seen on this text, {head.longest.norm:.4g},"
        f" could still reach {_sure(head.longest)}, and those of the usual length,"
        f" {head.usual.norm:.4g}, {_sure(head.usual)}."
    )
    if head.usual.entropy < found.target.entropy / 100:
        text += (
            " Such lengths bound nothing in practice: many logits that differ make them, not one"
            " that stands out."
        )
    if head.capped:
        text += f" Its softcap of {head.softcap:g} alone would allow {_sure(head.capped)}."
    return text


def _sure(reach: Reach) -> str:
    return f"a probability of {_most(reach.confidence)} (entropy {reach.entropy:.2g} nats)"


def _most(share: float) -> str:
    """A probability; 1 only where nothing is missing that one would write."""
    if share > 0.9999:
        return "over 0.9999"
    return f"{share:.4f}" if share > 0.001 else f"{share:.1e}"


def _is(found: Diagnosis) -> str:
    gap = found.gap
    if (gap.low or 0) > 0:
        verdict = "over-confident"
    elif (gap.high or 0) < 0:
        verdict = "under-confident"
    else:
        verdict = "neither over- nor under-confident beyond chance"
    return (
        f"How sure is it? On {found.tokens:,} tokens of this text its entropy is"
        f" {_with(found.entropy, '.2f')} nats on average, its confidence"
        f" {_with(found.confidence, '.3f')} and its accuracy {_with(found.accuracy, '.3f')}:"
        f" it is {verdict} (confidence − accuracy {_with(gap, '+.3f')}); ECE"
        f" {_with(found.ece, '.3f')}. In brackets 95 % bootstrap intervals over the tokens, as if"
        f" these were independent; they are of one text, and another has other numbers. {SHIFTED}"
    )


def _with(measure: Measure, form: str) -> str:
    return f"{measure.value:{form}} [{measure.low:{form}}, {measure.high:{form}}]"


def _smoothing(found: Diagnosis) -> str:
    target = found.target
    asks = (
        f"Is smoothing likely to help? Smoothing by β = {found.label_smoothing:g} holds a certain"
        f" prediction at a probability of {target.confidence:.4f} (entropy"
        f" {target.entropy:.2f} nats), {target.gap:.1f} nats of logit above every other token."
        f" {found.unable:.0%} of the tokens have logits too short to be that sure. It pulls on the"
        f" mean distance to the largest logit, {found.distance:.1f} nats here."
    )
    if found.unable > 0.5:
        return (
            asks + " Not likely: most predictions cannot get there anyhow, so there is little to"
            " hold back."
        )
    if (found.gap.low or 0) > 0:
        return asks + " Likely: the head has the room to be over-confident, and on this text it is."
    if (found.gap.high or 0) < 0:
        return (
            asks + " Not for this model on this text, which is under-confident already: smoothing"
            " would make it more so. Fine-tuning can turn that round; diagnose again after it."
        )
    return (
        asks + " The head has the room to become over-confident, but on this text it is not. What"
        " smoothing can do is keep it so while it is fine-tuned; diagnose again after that."
    )


def _temperature(found: Diagnosis) -> str:
    before, after = found.before, found.after
    does = "softens" if found.temperature > 1 else "sharpens"
    ends = {TEMPERATURES[0]: " or less", TEMPERATURES[-1]: " or more"}
    best = f"{found.temperature:g}{ends.get(found.temperature, '')}"
    return (
        f"What would a temperature change? T = {best}, fitted on half of the"
        f" tokens, {does} predictions without changing which is first. On the other half ECE goes"
        f" from {before.ece:.3f} to {after.ece:.3f}, NLL from {before.nll:.3f} to {after.nll:.3f}"
        f" nats, confidence from {before.confidence:.3f} to {after.confidence:.3f}."
    )


def _softcap(found: Diagnosis) -> str:
    if not found.softcaps:
        return f"What would a softcap change? It has one of {found.head.softcap:g} already."
    lines = [
        f"c = {v.softcap:g} allows a probability of"
        f" {_most(theory.softcap_confidence_bound(v.softcap or 0, found.head.vocab_size))} at most:"
        f" NLL {v.nll:.3f}, confidence {v.confidence:.3f}, ECE {v.ece:.3f}"
        for v in found.softcaps
    ]
    return (
        "What would a softcap change? Put on this model as it is, without training, and beside"
        f" NLL {found.nll.value:.3f}, confidence {found.confidence.value:.3f}, ECE"
        f" {found.ece.value:.3f} now: {'; '.join(lines)}. A model that is trained with a cap learns"
        " to live with it, which this does not show."
    )


def figure(name: str, found: Diagnosis, points: dict[str, np.ndarray]) -> Figure:
    """The bound against V and D as in the paper's Figure 4; this model's tokens; T and softcaps."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.6, 7.4), layout="constrained")
    drawn.suptitle(f"{name}: how sure can it be, and how sure is it?", color=INK)
    by_v, by_d, seen, scaled = drawn.subplots(2, 2).ravel()
    _draw_bounds(by_v, by_d, found.head)
    _draw_tokens(seen, found, points)
    _draw_temperatures(scaled, found)
    for ax in (by_v, by_d, seen, scaled):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn


def _draw_bounds(by_v: Axes, by_d: Axes, head: Head) -> None:
    """With σ_C = 1 and ‖h‖ = √D, as an RMS norm leaves it: what V and D alone do."""
    sizes = np.unique(np.geomspace(2**8, 2**20, 60).astype(int))
    widths = np.geomspace(16, 8192, 60)
    for k, d in enumerate((64, 128, 256, 512)):
        bound = [float(theory.entropy_lower_bound(math.sqrt(d), int(v))) for v in sizes]
        by_v.plot(sizes, bound, color=BLUE, alpha=1 - 0.2 * k, label=f"D = {d}")
    for k, v in enumerate((256_000, 128_256, 32_768, 4_096)):
        bound = np.asarray(theory.entropy_lower_bound(np.sqrt(widths), v))
        by_d.plot(widths, bound, color=GREEN, alpha=1 - 0.2 * k, label=f"V = {v:,}")
    here = float(theory.entropy_lower_bound(math.sqrt(head.hidden_size), head.vocab_size))
    for ax, x, what in ((by_v, head.vocab_size, "V"), (by_d, head.hidden_size, "D")):
        ax.plot([x], [here], "o", color=RED, label="this model's V and D", zorder=3)
        ax.set(xscale="log", xlabel=what, ylabel="least entropy, nats")
        ax.legend(fontsize="x-small", frameon=False)
        ax.set_title(f"The bound against {what}, at σ_C = 1, ‖h‖ = √D", fontsize="medium")


def _draw_tokens(ax: Axes, found: Diagnosis, points: dict[str, np.ndarray]) -> None:
    v, length = found.head.vocab_size, points["length"]
    grid = np.geomspace(min(1.0, length.min()), 1.3 * length.max(), 200)
    ax.plot(grid, np.asarray(theory.entropy_lower_bound(grid, v)), color=INK, label="the bound")
    ax.plot(length, points["entropy"], ".", ms=3, color=BLUE, alpha=0.6, label="tokens")
    if found.head.capped:
        ax.axhline(found.head.capped.entropy, color=GREEN, ls="--", lw=1, label="softcap's bound")
    beta = found.label_smoothing
    ax.axhline(found.target.entropy, color=RED, ls=":", label=f"smoothed target, β = {beta:g}")
    ax.axhline(math.log(v), color="0.6", lw=0.8, label="log V")
    ax.set(xscale="log", xlabel="length of the centred logits", ylabel="entropy, nats")
    ax.set_title("This model on this text", fontsize="medium")
    _legend_below(ax)


def _draw_temperatures(ax: Axes, found: Diagnosis) -> None:
    tried = [v.temperature for v in found.temperatures]
    ax.plot(tried, [v.ece for v in found.temperatures], "o-", color=BLUE, ms=4, label="ECE")
    gaps = [v.confidence - (found.accuracy.value or 0) for v in found.temperatures]
    ax.plot(tried, gaps, "s--", color=RED, ms=4, label="confidence − accuracy")
    ax.axhline(0, color=INK, lw=0.8)
    ax.axvline(found.temperature, color=GREEN, lw=1.2, label=f"best NLL: T = {found.temperature:g}")
    if found.softcaps:
        by_ece = sorted(found.softcaps, key=lambda v: -v.ece)
        label = f"ECE at softcap {', '.join(f'{v.softcap:g}' for v in by_ece)}, from the top"
        eces = [v.ece for v in by_ece]
        ax.plot([1.0] * len(eces), eces, "^", color="#b279a2", alpha=0.7, label=label)
    ax.set(xscale="log", xlabel="temperature")
    ax.set_xticks(tried, [f"{t:g}" for t in tried], fontsize="x-small")
    ax.minorticks_off()
    ax.set_title("What a temperature or a softcap changes", fontsize="medium")
    _legend_below(ax)


def _legend_below(ax: Axes) -> None:
    """Where there is room among the lines differs from model to model."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    ax.legend(fontsize="x-small", frameon=False, ncols=2, **place)
