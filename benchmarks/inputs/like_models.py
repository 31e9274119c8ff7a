"""Hidden states, head and labels like real models', column by column.

How fast a filtered backward runs depends on which probabilities pass ε: how many, in how few
columns, how the columns of neighbouring tokens overlap, where they lie in the vocabulary. Random
inputs get all of that wrong, so this file draws logits that get it right:

    z_nv = p_v + c_n · w_v,    c_n = context_n (topic and own noise) + anchor_n · w_{a_n}

p is how popular class v is whatever the context, heavy-tailed and partly shared by neighbouring
ids (scripts, languages); w_v is the meaning of class v in a space whose spectrum falls as a power
law; a_n is a class that token n leans to, drawn by popularity. Labels are drawn from
softmax(z_n) itself, so the loss is what such a model would pay.

The starting point was measured on the logits of Gemma 3 270M on Alpaca text: popularity of
standard deviation 3.2 and kurtosis 6, 30% of it shared by 128 neighbouring ids; context of
standard deviation 2.9, eigenvalues falling about as i^−0.85, correlation 0.26 at 8 tokens'
distance. `popularity`, `context`, `patches`, `topic` and the anchor were then moved by hand until
`column_statistics` agreed with the real models' (tests/benchmarks/inputs/test_like_models.py holds
both). What is matched is sparsity, which decides speed. The rank is at most 257, so the errors of a
gradient filter must be measured on real activations instead (`real.read`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.inputs.arrays import Arrays, Inputs
from benchmarks.inputs.cases import Case
from lsce.problem import cdiv

LATENT = 256
PATCHES = 128
CHUNK = 2048
TAIL = 1.25
"""Popularity is sign(x)|x|^TAIL of a normal x, which fits Gemma's quantiles up to 1 in 10,000."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the logits of a model are drawn from; logits in nats, shares in [0, 1]."""

    popularity: float
    """Standard deviation over classes of the part of a logit that no context changes."""
    patches: float
    """Share of popularity's variance that V/128 neighbouring ids have in common."""
    context: float
    """Standard deviation of the part of a logit that the context makes."""
    topic: float
    """Share of the context's variance that `topic_length` consecutive tokens have in common."""
    topic_length: int = 72
    context_spread: float = 0.15
    """Standard deviation of the logarithm of a token's own context strength."""
    anchor: float = 5.4
    """Mean nats that the class a token leans to gains; negative draws count as 0."""
    anchor_spread: float = 4.0
    spectrum: float = 0.85
    """Eigenvalue i of the context's covariance is proportional to i^−spectrum."""

    def __post_init__(self) -> None:
        for share in ("patches", "topic"):
            if not 0 <= getattr(self, share) <= 1:
                raise ValueError(f"{share}={getattr(self, share)} must be in [0, 1]")
        if self.topic_length < 1:
            raise ValueError(f"{self.topic_length=} must be at least 1")


PRESETS = {
    "gemma": Statistics(popularity=2.95, patches=0.6, context=3.6, topic=0.4),
    "smollm": Statistics(popularity=2.5, patches=0.2, context=3.8, topic=0.4),
}


def generate(
    preset: str | Statistics, n: int, d: int, v: int, *, seed: int = 0, dtype=jnp.bfloat16
) -> Arrays:
    """Draws inputs of N = `n` tokens, D = `d`, V = `v` with a preset's statistics.

    One jitted function of the seed: the same seed and device give the same bits, and D changes
    the logits only by rounding once D > 256. The fit holds near the presets' own vocabularies
    (256,000 and 49,152). ValueError for an unknown preset or a size that is too small.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; must be one of {', '.join(PRESETS)}")
    if n < 1 or d < 2 or v < 2:
        raise ValueError(f"{n=}, {d=}, {v=} must be at least 1, 2 and 2")
    statistics = PRESETS[preset] if isinstance(preset, str) else preset
    return _generate(statistics, n, d, v, jnp.dtype(dtype), jax.random.key(seed))


def draw(case: Case) -> Inputs:
    """A case's inputs, of the preset with the nearest vocabulary; on JAX's device."""
    preset = "gemma" if case.v > 100_000 else "smollm"
    drawn: Any = generate(preset, case.n, case.d, case.v)
    return Inputs(f"like {preset}", *drawn)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(s: Statistics, n: int, d: int, v: int, dtype, key: Array) -> Arrays:
    keys = iter(jax.random.split(key, 10))
    normal = jax.random.normal
    latent = min(LATENT, d - 1)
    scale = jnp.arange(1.0, latent + 1)[None] ** (-s.spectrum / 4)
    scale /= jnp.sum(scale**4) ** 0.25  # w · w' then has variance 1

    shared = normal(next(keys), (PATCHES,))[jnp.arange(v) * PATCHES // v]
    x = math.sqrt(s.patches) * shared + math.sqrt(1 - s.patches) * normal(next(keys), (v,))
    # Draws by rank only: the few most popular classes would make every seed another model.
    rank = jnp.argsort(jnp.argsort(x)).astype(x.dtype)
    x = jax.scipy.special.ndtri((rank + 0.5) / v)
    moment = 2**TAIL * math.gamma(TAIL + 0.5) / math.sqrt(math.pi)  # E |x|^(2 TAIL)
    popularity = s.popularity / math.sqrt(moment) * jnp.sign(x) * jnp.abs(x) ** TAIL
    meaning = normal(next(keys), (v, latent)) * scale

    topics = normal(next(keys), (cdiv(n, s.topic_length), latent))
    topic = topics[jnp.arange(n) // s.topic_length]
    own = normal(next(keys), (n, latent))
    strength = s.context * jnp.exp(s.context_spread * normal(next(keys), (n, 1)))
    context = strength * scale * (math.sqrt(s.topic) * topic + math.sqrt(1 - s.topic) * own)

    below = jnp.cumsum(jax.nn.softmax(popularity))
    anchors = jnp.searchsorted(below, jax.random.uniform(next(keys), (n,)) * below[-1])
    nats = jnp.maximum(s.anchor + s.anchor_spread * normal(next(keys), (n, 1)), 0)
    context += nats / jnp.sum(scale**2) * meaning[anchors]

    # The popular direction's size is shared out evenly, then one rotation makes all D dense.
    root = math.sqrt(s.popularity) if s.popularity > 0 else 1.0
    basis = _orthonormal(next(keys), latent + 1, d)
    hidden = jnp.concatenate([jnp.full((n, 1), root), context], axis=1) @ basis
    head = jnp.concatenate([popularity[:, None] / root, meaning], axis=1) @ basis
    hidden, head = hidden.astype(dtype), head.astype(dtype)
    return Arrays(hidden, head, _sample(next(keys), hidden, head))


def _sample(key: Array, hidden: Float[Array, "N D"], head: Float[Array, "V D"]) -> Int[Array, " N"]:
    """A class for each token from softmax(hidden · headᵀ), by Gumbel maxima a chunk at a time."""
    v = head.shape[0]
    width = min(CHUNK, v)

    def step(best, i):
        start = jnp.minimum(i * width, v - width)
        rows = jax.lax.dynamic_slice_in_dim(head, start, width)
        z = jnp.dot(hidden, rows.T, preferred_element_type=jnp.float32)
        z += jax.random.gumbel(jax.random.fold_in(key, i), z.shape)
        ids = start + jnp.arange(width)
        # The last chunk overlaps its neighbour.
        z = jnp.where((ids >= i * width)[None], z, -jnp.inf)
        value, label = best
        at = jnp.argmax(z, axis=1)
        top = jnp.max(z, axis=1)
        return (jnp.maximum(value, top), jnp.where(top > value, ids[at], label)), None

    n = hidden.shape[0]
    start = jnp.full(n, -jnp.inf), jnp.zeros(n, jnp.int32)
    (_, labels), _ = jax.lax.scan(step, start, jnp.arange(cdiv(v, width)))
    return labels


def _orthonormal(key: Array, rows: int, d: int) -> Float[Array, "rows D"]:
    return jnp.linalg.qr(jax.random.normal(key, (d, rows)))[0].T
