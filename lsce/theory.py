"""How concentrated a head can be: the theory behind smoothing large vocabularies, as functions.

Logits z = C·h of a vocabulary of V tokens can be no longer than σ = σ_C·σ_h (Lemma 4.1), and logits
of bounded length leave a distribution that is not sure: its entropy has a lower bound (Theorem
4.2), its largest probability an upper one. Smoothing pulls on the distances between logits
(Proposition 3.3), so it has nothing to do where a head cannot reach what smoothing allows anyhow.

| question | function |
| --- | --- |
| how long can logits be? | `spectral_norm` of the head, `logit_norm_bound` |
| how long are they? | `logit_norms` of tokens |
| how sure can p = softmax(z) be? | `entropy_lower_bound`, `confidence_upper_bound` |
| and under a softcap? | `softcap_entropy_bound`, `softcap_confidence_bound` |
| what does smoothing ask for? | `smoothed_target` |
| what does it pull on? | `logit_distance`, `divergence_from_uniform` of a `TokenStats` |

A shift of all logits of a token changes no probability. The bounds therefore hold for the length of
the centred logits z − z̄ as well, which is the shorter one; `centred` asks for that. Logarithms are
natural: entropies and logits are in nats. Functions of arrays work inside `jit` and `vmap`; none
makes an N×V array.

Sources: Huang, Lu and Zeng, "Calibrated Language Models and How to Find Them with Label Smoothing",
ICML 2025, https://arxiv.org/abs/2508.00264 (its Eq. 37 misprints γ; what stands here is derived
from the minimiser, and tested against it); Zhai et al., "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse", 2023, https://arxiv.org/abs/2303.06296, Theorem 3.1, for the
same bound on attention; Liu et al., "The Devil is in the Margin", 2022,
https://arxiv.org/abs/2111.15430, for the distances.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from lsce.arguments import boolean, integer, number
from lsce.calibration import validate
from lsce.stats import TokenStats

ITERATIONS = 500
"""Steps of the power method, at most; a trained head takes some ten: one direction stands out."""


def entropy_lower_bound(sigma: Float[ArrayLike, "*norms"], vocab_size: int) -> Float[Array, "*"]:
    """The least entropy of softmax(z) over all z ∈ ℝ^V with ‖z‖₂ ≤ σ, in nats (Theorem 4.2).

        γ = exp(−σ·√(V/(V−1)))
        H = log(1 + (V−1)·γ) + σ·√(V·(V−1))·γ / (1 + (V−1)·γ)

    It is reached, at `least_entropy_logits`. At σ = 0 it is log V; it falls to half of that about
    where σ = log V, and then fast.

    Args:
      sigma: σ ≥ 0, of any shape: the most that ‖z‖₂, or ‖z − z̄‖₂, can be.
      vocab_size: V ≥ 2.

    Raises ValueError for a σ below 0 or NaN or a V below 2, TypeError for integers as σ or for a V
    that is none.

    >>> f"{entropy_lower_bound(0.0, 262144):.4f} = log V, {entropy_lower_bound(20.0, 262144):.4f}"
    '12.4766 = log V, 0.0113'
    """
    gap, rest = _one_above(_norm("sigma", sigma), _vocabulary(vocab_size))
    return jax.nn.softplus(rest) + _product(gap, jax.nn.sigmoid(rest))


def confidence_upper_bound(sigma: Float[ArrayLike, "*norms"], vocab_size: int) -> Float[Array, "*"]:
    """The greatest max_v p_v of p = softmax(z) over all ‖z‖₂ ≤ σ: 1 / (1 + (V−1)·γ).

    Arguments, γ and what raises as in `entropy_lower_bound`; the same logits reach both.
    """
    _, rest = _one_above(_norm("sigma", sigma), _vocabulary(vocab_size))
    return jax.nn.sigmoid(-rest)


def least_entropy_logits(sigma: float, vocab_size: int) -> Float[np.ndarray, " V"]:
    """The z of length σ whose softmax has the least entropy, float64 on the host.

    One logit of σ·√((V−1)/V) above V − 1 of −σ/√(V·(V−1)): they sum to 0. Raises as
    `entropy_lower_bound` does.
    """
    v = _vocabulary(vocab_size)
    length = float(np.asarray(_norm("sigma", number("sigma", sigma)), np.float64))
    z = np.full(v, -length / math.sqrt(v * (v - 1)))
    z[0] = length * math.sqrt((v - 1) / v)
    return z


def softcap_entropy_bound(softcap: float, vocab_size: int) -> float:
    """The least entropy of softmax(z) over all |z_v| ≤ c, in nats: what a softcap leaves possible.

        H_k = log(k·e^g + V − k) − g·k·e^g / (k·e^g + V − k),   g = 2c,   least over k ∈ [1, V)

    k logits stand at +c and the others at −c. Entropy is concave in p, and these are the corners of
    {p : p_i ≤ e^g·p_j}. Unlike under a bound on the length, one logit alone at the top is the worst
    case only where e^g is large beside V.

    Raises ValueError for a cap that is not above 0 or a V below 2.
    """
    v, gap = _vocabulary(vocab_size), 2 * _cap(softcap)
    # dH/dk = 0 where the normaliser is g·e^g/(e^g − 1) times what V logits at the bottom have.
    share = (gap / -math.expm1(-gap) - 1) / math.expm1(gap) if gap < 700 else 0.0
    near = math.floor(share * v)
    return min(_two_levels(k, v, gap) for k in {min(max(k, 1), v - 1) for k in (near, near + 1)})


def softcap_confidence_bound(softcap: float, vocab_size: int) -> float:
    """The greatest max_v p_v over all |z_v| ≤ c: 1 / (1 + (V−1)·e^(−2c)); raises as above."""
    v, gap = _vocabulary(vocab_size), 2 * _cap(softcap)
    return 1 / (1 + (v - 1) * math.exp(-gap))


def spectral_norm(
    matrix: Float[ArrayLike, "V D"],
    *,
    centred: bool = False,
    tolerance: float = 1e-6,
) -> Float[Array, ""]:
    """σ_C, the largest singular value of a head C, float32: the power method on CᵀC.

    From below, and as near as the last steps differed. Memory beyond a float32 matrix is vectors of
    V and D; the matrix is read twice an iteration, at most `ITERATIONS` times.

    Args:
      matrix: C, rows are tokens.
      centred: of C less its mean row, so of what differs from token to token.
      tolerance: relative change of σ² from one iteration to the next at which it ends.

    Raises ValueError for a wrong rank, no entries, or a tolerance outside (0, 1); TypeError for
    integers. NaN for a matrix that has one.
    """
    c = _matrix("matrix", matrix)
    tolerance = validate.unit_interval("tolerance", tolerance, open_ends=True)
    return _spectral_norm(c, boolean("centred", centred), tolerance)


def logit_norm_bound(
    hidden: Float[ArrayLike, "*tokens D"],
    head: Float[ArrayLike, "V D"],
    *,
    centred: bool = False,
) -> Float[Array, "*tokens"]:
    """σ_C·‖h‖₂ of each token, float32: what ‖C·h‖₂ can be at most (Lemma 4.1).

    Its largest entry is σ_C·σ_h over these tokens, with σ_h = max_n ‖h_n‖₂. With `centred` the
    bound is on ‖z − z̄‖₂, and σ_C that of the centred head. A softcap only shortens both.

    Raises as `spectral_norm` does, and ValueError for widths that differ.
    """
    h, c = _hidden(hidden, head)
    sigma = spectral_norm(c, centred=centred)
    return sigma * jnp.linalg.norm(h, axis=-1)


def logit_norms(
    hidden: Float[ArrayLike, "*tokens D"], head: Float[ArrayLike, "V D"]
) -> Float[Array, "*tokens"]:
    """‖z − z̄‖₂ of each token's logits z = C·h, float32: what the bounds are nearest at.

    √(hᵀ·G·h) with the D×D matrix G = Σ_v (C_v − c̄)(C_v − c̄)ᵀ: no logits are made. Raises as
    `logit_norm_bound` does.
    """
    h, c = _hidden(hidden, head)
    return _logit_norms(h, c)


class SmoothedTarget(NamedTuple):
    """The distribution that minimises the smoothed loss of a token whose label is certain."""

    confidence: float
    """q_y = 1 − β + β/V."""
    entropy: float
    """−Σ_v q_v log q_v, nats."""
    gap: float
    """z_y − z_v that it takes: log(1 + (1−β)·V/β), nats; ∞ at β = 0."""


def smoothed_target(label_smoothing: float, vocab_size: int) -> SmoothedTarget:
    """What smoothing by β asks of a model that is sure of the label, over a vocabulary of V.

    A head whose `entropy_lower_bound` lies above this entropy cannot become as sure as smoothing
    allows: smoothing then holds nothing back.

    Raises ValueError for a β outside [0, 1] or a V below 2.

    >>> target = smoothed_target(0.1, 262144)
    >>> f"{target.confidence:.4f}, {target.entropy:.3f} nats, a gap of {target.gap:.2f}"
    '0.9000, 1.573 nats, a gap of 14.67'
    """
    v = _vocabulary(vocab_size)
    beta = validate.unit_interval("label_smoothing", label_smoothing)
    top, other = 1 - beta + beta / v, beta / v
    if other == 0:
        return SmoothedTarget(1.0, 0.0, math.inf)
    entropy = -top * math.log(top) - (v - 1) * other * math.log(other)
    return SmoothedTarget(top, entropy, math.log(top / other))


def logit_distance(stats: TokenStats) -> Float[Array, "*tokens"]:
    """(1/V) Σ_v (max_u z_u − z_v) of each token, nats: what smoothing shortens.

    Proposition 3.3: it lies within log V above KL(u‖p), u being uniform,

        KL(u‖p) ≤ (1/V) Σ_v (max_u z_u − z_v) ≤ KL(u‖p) + log V,

    and the smoothed loss is (1−β)·(−log p_y) + β·(KL(u‖p) + log V): a penalty on this distance, up
    to a constant, that leaves p = u alone without a price.
    """
    return stats.lse + jnp.log(stats.confidence) - stats.mean_logit


def divergence_from_uniform(stats: TokenStats, vocab_size: int) -> Float[Array, "*tokens"]:
    """KL(u‖p) = lse − z̄ − log V of each token, nats."""
    return stats.lse - stats.mean_logit - math.log(_vocabulary(vocab_size))


def _one_above(
    sigma: Float[Array, "*norms"], v: int
) -> tuple[Float[Array, "*norms"], Float[Array, "*norms"]]:
    """The gap −log γ of the minimiser, and log((V−1)·γ), the log-odds of all but its top token."""
    gap = sigma * math.sqrt(v / (v - 1))
    return gap, math.log(v - 1) - gap


def _product(gap: Float[Array, "*norms"], share: Float[Array, "*norms"]) -> Float[Array, "*norms"]:
    """gap · share, 0 where the share is: an infinite σ bounds nothing."""
    return jnp.where(share > 0, gap, 0) * share


def _two_levels(k: int, v: int, gap: float) -> float:
    """H_k, from the log-odds of the k tokens at the top."""
    odds = math.log(k) - math.log(v - k) + gap
    below = 1 / (1 + math.exp(odds)) if odds < 700 else 0.0
    # log(k·e^g + V − k) − g = log k + log(1 + (V−k)/(k·e^g))
    return (
        math.log(k)
        + (math.log1p(math.exp(-odds)) if odds > -700 else -odds)
        + (gap * below if below > 0 else 0.0)
    )


@functools.partial(jax.jit, static_argnames=("centred",))
def _spectral_norm(c: Float[Array, "V D"], centred: bool, tolerance: float) -> Float[Array, ""]:
    c = c.astype(jnp.float32)
    mean = jnp.mean(c, axis=0) if centred else jnp.zeros(c.shape[1], jnp.float32)

    def squared(x):
        """(C − 1·c̄ᵀ)ᵀ(C − 1·c̄ᵀ)·x: centring twice is centring once."""
        z = _dot(c, x) - jnp.dot(mean, x)
        return _dot(z, c) - jnp.sum(z) * mean

    def unfinished(state):
        i, _, before, now = state
        return (i < ITERATIONS) & (jnp.abs(now - before) > tolerance * now)

    def step(state):
        i, x, _, before = state
        y = squared(x)
        length = jnp.linalg.norm(y)
        return i + 1, y / jnp.where(length > 0, length, 1), before, length

    # Random, for no direction of a trained head is then missed; fixed, for equal results.
    x = jax.random.normal(jax.random.key(0), (c.shape[1],), jnp.float32)
    start = (0, x / jnp.linalg.norm(x), jnp.float32(jnp.inf), jnp.float32(0))
    _, _, _, sigma_squared = lax.while_loop(unfinished, step, start)
    return jnp.sqrt(sigma_squared)


@jax.jit
def _logit_norms(h: Float[Array, "*tokens D"], c: Float[Array, "V D"]) -> Float[Array, "*tokens"]:
    c, h = c.astype(jnp.float32), h.astype(jnp.float32)
    c = c - jnp.mean(c, axis=0, keepdims=True)
    gram = jnp.matmul(c.T, c, precision=lax.Precision.HIGHEST)
    squared = jnp.sum(jnp.matmul(h, gram, precision=lax.Precision.HIGHEST) * h, axis=-1)
    return jnp.sqrt(jnp.maximum(squared, 0))


_dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)


def _vocabulary(vocab_size: int) -> int:
    v = integer("vocab_size", vocab_size)
    if v < 2:
        raise ValueError(f"vocab_size must be at least 2, got {v}")
    return v


def _norm(name: str, value: ArrayLike) -> Float[Array, "*norms"]:
    norm = validate.real_array(name, value)
    if validate.known(value):
        validate.refuse(name, value, ~(np.asarray(value, np.float64) >= 0), "be at least 0")
    return norm


def _cap(softcap: float) -> float:
    cap = number("softcap", softcap)
    if not cap > 0:
        raise ValueError(f"softcap must be more than 0, got {cap}")
    return cap


def _matrix(name: str, value: ArrayLike) -> Float[Array, "V D"]:
    c = validate.to_array(value)
    if not jnp.issubdtype(c.dtype, jnp.floating):
        raise TypeError(f"{name} must be a float array, got dtype {c.dtype}")
    if c.ndim != 2 or c.size == 0:
        raise ValueError(f"{name} must have shape [V, D] with V, D ≥ 1, got {c.shape}")
    return c


def _hidden(
    hidden: ArrayLike, head: ArrayLike
) -> tuple[Float[Array, "*tokens D"], Float[Array, "V D"]]:
    h, c = validate.real_array("hidden", hidden), _matrix("head", head)
    if h.ndim == 0 or h.shape[-1] != c.shape[1]:
        raise ValueError(f"hidden has shape {h.shape}, but head has shape {c.shape}")
    return h, c
