"""Grouped-query attention with rotary positions: what a token may see, and who computes it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from train import mesh
from train.models import flash
from train.models.cache import LayerCache
from train.models.config import LayerKind, ModelConfig, Rope
from train.models.layers import RMSNorm, elementwise, linear, side_by_side

MOST_SEGMENTS = 32
"""Segments of a row up to which the packed layout beats a mask: its time grows with them."""

cudnn: Any = None
with contextlib.suppress(ImportError):  # not public: `choose` does without where it is missing
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")


Way = Literal["xla", "causal", "packed", "masked", "flash"]
"""Who attends: XLA, or kernels that keep no scores: cuDNN's, for rows of one segment each, for
segments given by where they start, or under a mask, which they read, or those of `flash`, which
skip what no token sees."""


class View(NamedTuple):
    """Where the tokens of a batch stand and what they see: the same for all layers of a kind."""

    rotation: tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]
    """cos and sin of each token's angles, float32."""
    way: Way
    mask: Bool[Array, "B 1 T S"]
    """Whether token t sees token s. No program computes it in vain."""
    starts: Int[Array, "B M"] | None = None
    """Where the segments of a row begin, in order; T where there are no more."""
    window: int | None = None
    seen: flash.Bounds | None = None
    """What `starts` and `window` come to, for `flash`."""


class Attention(nnx.Module):
    """`heads` queries share `kv_heads` keys and values."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        inner, shared = (n * config.head_size for n in (config.heads, config.kv_heads))
        bias = config.qkv_bias
        self.query = linear(config, config.hidden_size, inner, rngs, bias=bias)
        self.key = linear(config, config.hidden_size, shared, rngs, bias=bias)
        self.value = linear(config, config.hidden_size, shared, rngs, bias=bias)
        self.out = linear(config, inner, config.hidden_size, rngs, residual=True)
        if config.qk_norms:
            self.query_norm = RMSNorm(config.head_size, config)
            self.key_norm = RMSNorm(config.head_size, config)

    def __call__(
        self, x: Float[Array, "B T D"], view: View, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The mix of what each token sees, and the cache with these tokens' keys and values."""
        config = self.config
        together = side_by_side(x, self.query, self.key, self.value)
        together = together.reshape(*x.shape[:2], -1, config.head_size)
        query, key, value = jnp.split(
            together, (config.heads, config.heads + config.kv_heads), axis=2
        )
        if config.qk_norms:
            query, key = self.query_norm(query), self.key_norm(key)
        turn = elementwise(apply_rope)
        query, key = turn(query, view.rotation), turn(key, view.rotation)
        if cache is not None:
            cache = cache.append(key, value)
            key, value = cache.keys, cache.values
        mixed = attend(
            query,
            key,
            value,
            view,
            scale=config.query_scale or config.head_size**-0.5,
            softcap=config.attention_softcap,
        )
        return self.out(mixed.reshape(*x.shape[:2], -1)), cache


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    view: View,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(cap(scale · query · keyᵀ)) · value over what is seen, where N/K queries share a key.

    The softmax is float32.
    """
    if view.way == "xla":
        return _attend_by_xla(query, key, value, view.mask, scale, softcap)
    if view.way == "packed":
        assert view.starts is not None
        return _attend_packed(query, key, value, view.starts, view.window, scale)
    if view.way == "flash":
        assert view.seen is not None
        return _attend_by_flash(query, key, value, view.seen, scale, softcap)
    causal = view.way == "causal"
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if causal else view.mask,
        is_causal=causal,
        local_window_size=(view.window - 1, 0) if causal and view.window else None,
        scale=scale,
        implementation="cudnn",
    )


def _attend_by_xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Heads come before tokens inside: on a CPU the gradient takes half the time that it takes
    `jax.nn.dot_product_attention`."""
    shared = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.einsum("bnth,bnsh->bnts", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("bnts,bnsh->bnth", weights, value), 1, 2)


def _attend_packed(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    starts: Int[Array, "B M"],
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """cuDNN's packed layout, which `jax.nn` does not offer. Its time grows with B · M."""
    length = query.shape[1]
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    exists = starts < ends
    lengths = jnp.where(exists, ends - starts, -1)
    offsets = jnp.pad(jnp.where(exists, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
    return cudnn.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
        scale=scale,
    )


def _attend_by_flash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    seen: flash.Bounds,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Each device its rows: XLA cannot split a kernel."""
    attention = functools.partial(flash.attention, scale=scale, softcap=softcap)
    on = mesh.of(query)
    if on is not None and len(query) % on.size == 0:
        rows = PartitionSpec(mesh.ROWS)
        attention = jax.shard_map(
            attention, mesh=on, in_specs=rows, out_specs=rows, check_vma=False
        )
    return attention(query, key, value, seen)


def choose(
    config: ModelConfig,
    *,
    length: int,
    segments: int | None,
    cached: bool,
    capability: str | None,
) -> tuple[Way, str]:
    """Who attends, and why not somebody faster.

    Args:
        config: the model.
        length: tokens in a row.
        segments: the most segments that a row has; None where nobody says.
        cached: whether keys come from a cache.
        capability: the CUDA device's, as "9.0"; None for another device.
    """
    major = int(capability.split(".")[0]) if capability else 0
    if (
        config.attention == "auto"
        and major == 9
        and config.dtype == "bfloat16"
        and config.head_size in flash.HEAD_SIZES
        and segments is not None
        and not cached
    ):
        return "flash", "what no token sees is skipped"
    most = 256 if major >= 9 else 128
    reasons = {
        "attention='xla' was asked for": config.attention == "xla",
        "no CUDA device from Ampere on": major < 8,
        f"cuDNN has no softcap of scores ({config.attention_softcap})": bool(
            config.attention_softcap
        ),
        f"cuDNN takes no {config.dtype}": config.dtype not in ("bfloat16", "float16"),
        f"{config.head_size=} must be a multiple of 8 up to {most}": (
            config.head_size % 8 != 0 or config.head_size > most
        ),
        "keys come from a cache": cached,
    }
    for reason, holds in reasons.items():
        if holds:
            return "xla", reason
    if segments == 1:
        return "causal", "each row is one segment"
    reasons = {
        "nobody says where segments start": segments is None,
        "cuDNN's packed layout needs Hopper": major < 9,
        "this jax has no packed layout": cudnn is None,
        f"{segments} segments a row take longer than a mask": (segments or 0) > MOST_SEGMENTS,
    }
    for reason, holds in reasons.items():
        if holds and length % 2:
            return "xla", f"{reason}, and a mask's {length=} must be even"
        if holds:
            return "masked", reason
    return "packed", f"up to {segments} segments a row"


def capability() -> str | None:
    """The compute capability of the default device; None unless it is CUDA's."""
    if "cuda" not in jax.devices()[0].client.platform_version:
        return None
    return jax.devices()[0].compute_capability


def view(
    config: ModelConfig,
    kind: LayerKind,
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    starts: Int[Array, "B M"] | None = None,
    past: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None = None,
) -> View:
    """The view of T tokens of each row, in layers of that kind.

    Args:
        config: the model.
        kind: the layers' positions and window.
        segments: the segment of each of the T tokens.
        positions: the index of each of them within its segment.
        starts: where the segments of a row begin, in order, and T where there are no more; None
            where nobody says. Padding belongs to the segment before it, which does not see it.
        past: the segments and positions of all S tokens of a cache, these included; None if there
            is none.
    """
    way, _ = choose(
        config,
        length=segments.shape[1],
        segments=None if starts is None else starts.shape[1],
        cached=past is not None,
        capability=capability(),
    )
    seen = None
    if way == "flash":
        assert starts is not None
        seen = flash.bounds(starts, segments.shape[1], kind.window)
    return View(
        rope_rotation(positions, config.head_size, kind.rope),
        way,
        (
            attention_mask(segments, kind.window)
            if past is None
            else cached_mask(segments, positions, *past, kind.window)
        ),
        starts,
        kind.window,
        seen,
    )


def attention_mask(
    segments: Int[Array, "B T"], window: int | None = None
) -> Bool[Array, "B 1 T T"]:
    """True where token t may see token s: s ≤ t and t − s < window, in the same segment.

    Padding sees the padding before it, so that no row of the softmax is empty.
    """
    same = segments[:, :, None] == segments[:, None, :]
    index = jnp.arange(segments.shape[1])
    distance = index[:, None] - index[None]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (same & seen[None])[:, None]


def cached_mask(
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    past_segments: Int[Array, "B S"],
    past_positions: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """True where token t may see token s of a cache: in its own segment or in segment 1, the trunk,
    at no later position, and less than `window` before it.

    Positions count, as padding may lie between tokens that follow each other. It sees padding.
    """
    t, s = segments[:, :, None], past_segments[:, None, :]
    related = (t == s) | ((t > 1) & (s == 1))
    distance = positions[:, :, None] - past_positions[:, None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (related & seen)[:, None]


def frequencies(rope: Rope, head_size: int) -> Float[Array, " H/2"]:
    """The angle by which each pair of a head turns from a token to the next, float32.

    Sources: RoFormer (Su et al. 2021), https://arxiv.org/abs/2104.09864; Llama 3.1's scaling is
    that of https://github.com/meta-llama/llama-models, `apply_scaling`.
    """
    exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "none":
        return plain
    if rope.scaling == "linear":
        return plain / rope.factor
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    turns = rope.original_length * plain / (2 * math.pi)  # over the original context
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / rope.factor


def rope_rotation(
    positions: Int[Array, "B T"], head_size: int, rope: Rope
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """cos and sin of positions · frequencies, float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, head_size)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], rotation: tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]
) -> Float[Array, "B T N H"]:
    """Turn each pair (x_i, x_{i+H/2}) by its angle: the pairing of Hugging Face's Llama."""
    cos, sin = (part[:, :, None, None, :] for part in rotation)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    # A reversal rather than a concatenation: XLA makes it, and its gradient, part of what follows.
    other = jnp.flip(halves, axis=-2) * jnp.array([[-1.0], [1.0]])[None, None, None]
    return (halves * cos + other * sin).reshape(x.shape).astype(x.dtype)
