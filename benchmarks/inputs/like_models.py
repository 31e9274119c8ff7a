"""Hidden states, head and labels like real models', column by column, and real ones from files.

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
`column_statistics` agreed with the real models' (tests/benchmarks/test_activations.py holds both).
What is matched is sparsity, which decides speed. The rank is at most 257, so the errors of a
gradient filter must be measured on real activations instead (`read`).
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.cases import Case
from benchmarks.inputs import Inputs, open_numpy

LATENT = 256
PATCHES = 128
CHUNK = 2048
HIDDEN = "hidden.npy"
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


class Activations(NamedTuple):
    """One call's inputs."""

    hidden: Float[Array | np.ndarray, "N D"]
    head: Float[Array | np.ndarray, "V D"]
    labels: Int[Array | np.ndarray, " N"]


def generate(
    preset: str | Statistics, n: int, d: int, v: int, *, seed: int = 0, dtype=jnp.bfloat16
) -> Activations:
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
    arrays: Any = generate(preset, case.n, case.d, case.v)
    return Inputs(f"like {preset}", *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(s: Statistics, n: int, d: int, v: int, dtype, key: Array) -> Activations:
    keys = iter(jax.random.split(key, 10))
    normal = jax.random.normal
    latent = min(LATENT, d - 1)
    scale = jnp.arange(1, latent + 1)[None] ** (-s.spectrum / 4)
    scale /= jnp.sum(scale**4) ** 0.25  # w · w' then has variance 1

    shared = normal(next(keys), (PATCHES,))[jnp.arange(v) * PATCHES // v]
    x = math.sqrt(s.patches) * shared + math.sqrt(1 - s.patches) * normal(next(keys), (v,))
    # Draws by rank only: the few most popular classes would make every seed another model.
    x = jax.scipy.special.ndtri((jnp.argsort(jnp.argsort(x)) + 0.5) / v)
    moment = 2**TAIL * math.gamma(TAIL + 0.5) / math.sqrt(math.pi)  # E |x|^(2 TAIL)
    popularity = s.popularity / math.sqrt(moment) * jnp.sign(x) * jnp.abs(x) ** TAIL
    meaning = normal(next(keys), (v, latent)) * scale

    topics = normal(next(keys), (-(-n // s.topic_length), latent))
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
    return Activations(hidden, head, _sample(next(keys), hidden, head))


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
    (_, labels), _ = jax.lax.scan(step, start, jnp.arange(-(-v // width)))
    return labels


def _orthonormal(key: Array, rows: int, d: int) -> Float[Array, "rows D"]:
    return jnp.linalg.qr(jax.random.normal(key, (d, rows)))[0].T


def lift(x: Float[np.ndarray, "rows D"], d: int, *, seed: int = 0) -> Float[np.ndarray, "rows d"]:
    """x times one random [D, d] matrix with orthonormal rows, in x's dtype.

    Lifting hidden and head with the same seed leaves every logit what it was, up to rounding, and
    turns a small model's activations into a large one's shape. ValueError if d < D.
    """
    if d < x.shape[1]:
        raise ValueError(f"{d=} must be at least D={x.shape[1]}")
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, x.shape[1])))[0].T
    return (x.astype(np.float32) @ basis.astype(np.float32)).astype(x.dtype)


def read(folder: pathlib.Path, *, n: int | None = None, v: int | None = None) -> Activations:
    """A real model's activations on the host, bfloat16, from a folder of .npy pieces.

    `hidden.npy` [N, D] uint16 holds bfloat16's bits, `labels.npy` [N] int32 the next tokens, and
    the head is Q8_0, what GGUF files store: `head_q0.npy`, `head_q1.npy`, … [rows, D] int8, in
    order, and `head_scales.npy` [V, D/32] float16, a value being q times its 32 columns' scale.
    `n` takes the first n tokens and `v` the first v classes; tokens whose label lies outside are
    left out. ValueError if the pieces do not fit or fewer than n tokens remain.
    """
    hidden = open_numpy(folder / HIDDEN).view(ml_dtypes.bfloat16)
    labels = open_numpy(folder / "labels.npy").astype(np.int32)
    scales = open_numpy(folder / "head_scales.npy")
    head = np.empty((len(scales), hidden.shape[1]), ml_dtypes.bfloat16)
    paths = sorted(folder.glob("head_q*.npy"), key=lambda path: int(path.stem[len("head_q") :]))
    row = 0
    for path in paths:
        q = open_numpy(path)
        stop = row + len(q)
        if q.shape[1] != head.shape[1] or q.shape[1] != 32 * scales.shape[1] or stop > len(head):
            raise ValueError(
                f"{path} {q.shape} does not fit hidden {hidden.shape} and scales {scales.shape}"
            )
        blocks = q.reshape(len(q), -1, 32) * scales[row:stop, :, None].astype(np.float32)
        head[row:stop] = blocks.reshape(q.shape)
        row = stop
    if row != len(head) or len(labels) != len(hidden):
        raise ValueError(
            f"{folder} holds {row} of {len(head)} head rows, {len(hidden)} hidden states and "
            f"{len(labels)} labels"
        )
    return first(Activations(hidden, head, labels), folder, n=n, v=v)


def first(
    found: Activations, path: pathlib.Path, *, n: int | None = None, v: int | None = None
) -> Activations:
    """The first v classes and the first n tokens whose labels are among them, of what `path` held.

    ValueError if fewer than n tokens remain.
    """
    hidden, head, labels = found.hidden, found.head[:v], found.labels
    inside = np.flatnonzero((labels >= 0) & (labels < len(head)))[:n]
    if n is not None and len(inside) < n:
        raise ValueError(f"{path} has {len(inside)} tokens with labels < {len(head)}, not {n=}")
    return Activations(hidden[inside], head, labels[inside])


class ColumnStatistics(NamedTuple):
    """Which probabilities pass ε, as shares; a block is 128 consecutive tokens."""

    elements: float
    """Of all N·V, those with p > ε."""
    block_columns: float
    """Of V, the columns with such an element in a block; mean over blocks."""
    tiles: float
    """Of the tiles of a block and 128 consecutive columns, those with such an element."""
    sorted_tiles: float
    """The same with the columns ordered by their mean logit."""
    union: dict[int, float]
    """Of V, the columns with such an element in the first 1024, 2048, 4096, … tokens."""


def column_statistics(
    hidden: Float[Array | np.ndarray, "N D"],
    head: Float[Array | np.ndarray, "V D"],
    *,
    eps: float = 2.0**-12,
) -> ColumnStatistics:
    """Measures where p > eps, a block of tokens at a time; a ragged last block is left out.

    ValueError if there is no whole block of tokens or tile of columns.
    """
    blocks, v = len(hidden) // 128, len(head)
    if blocks == 0 or v < 128:
        raise ValueError(f"N={len(hidden)} and V={v} must both be at least 128")
    elements = 0
    active = np.zeros((blocks, v), bool)
    for block in range(blocks):
        count, columns = _active(hidden[128 * block : 128 * (block + 1)], head, eps)
        elements += int(count)
        active[block] = columns
    mean_logit = np.asarray(head, np.float32) @ np.asarray(hidden, np.float32).mean(0)
    union = np.logical_or.accumulate(active)
    sizes = [128 * 2**i for i in range(3, 20) if 2**i <= blocks]
    return ColumnStatistics(
        elements / (128 * blocks * v),
        float(active.mean()),
        _tiles(active),
        _tiles(active[:, np.argsort(-mean_logit, kind="stable")]),
        {size: float(union[size // 128 - 1].mean()) for size in sizes},
    )


@jax.jit
def _active(hidden: Float[Array, "B D"], head: Float[Array, "V D"], eps: float):
    z = jnp.dot(hidden, head.T, preferred_element_type=jnp.float32)
    above = jax.nn.softmax(z, axis=1) > eps
    return jnp.sum(above), jnp.any(above, axis=0)


def _tiles(active: np.ndarray) -> float:
    blocks, v = active.shape
    return float(active[:, : v // 128 * 128].reshape(blocks, -1, 128).any(2).mean())
