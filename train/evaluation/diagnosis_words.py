"""A diagnosis in plain words: a question, and what was measured as its answer."""

from __future__ import annotations

from lsce import theory
from train.evaluation.diagnosis import TEMPERATURES, Diagnosis, Reach
from train.evaluation.measures import SHIFTED
from train.evaluation.results import Measure


def words(found: Diagnosis) -> str:
    """The diagnosis in plain words, a paragraph a question."""
    return "\n\n".join(
        (_can_be(found), _is(found), _smoothing(found), _temperature(found), _softcap(found))
    )


def _can_be(found: Diagnosis) -> str:
    head = found.head
    text = (
        f"How sure can this head be? It has {head.vocab_size:,} tokens over {head.hidden_size}"
        f" features. With the spectral norm σ_C = {head.sigma_c:.4g} and hidden states of length up"
        f" to {head.sigma_h:.4g}, logits can be as long as {head.lemma.norm:.4g}; such logits could"
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
