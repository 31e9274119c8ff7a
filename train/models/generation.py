"""What a model says after a prompt, token by token."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.models.cache import Cache
from train.models.decoder import Decoder

FULL_CACHE = 256
"""Sizes of caches are multiples of it, so that few programs are compiled. A prompt is read so many
tokens at a time: its scores, all at once, could be gigabytes."""


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    stops: frozenset[int],
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that follow a prompt, one by one, up to the first of `stops`, which is not given.

    Each costs one row: keys and values of those before are kept.

    Args:
      model: the decoder.
      prompt: token ids, at least one.
      stops: ids that end the answer.
      max_tokens: how many to give at most.
      temperature: 0 for the likeliest; else logits are divided by it.
      top_p: draw among the fewest likeliest tokens with this share of the probability.
      seed: of the draws.

    Raises:
      ValueError: for an empty prompt.
    """
    if not len(prompt):
        raise ValueError("the prompt is empty: there is nothing to go on from")
    graphdef, params = nnx.split(model)
    length = _multiple(len(prompt))
    cache = Cache.empty(model.config, 1, _multiple(length + max_tokens))
    # Padding on the left, so that the last token is the last place.
    padding = length - len(prompt)
    tokens = np.pad(np.array(prompt, np.int32), (padding, 0))[None]
    segments = np.array([[0] * padding + [1] * len(prompt)], np.int32)
    positions = np.maximum(np.arange(length) - padding, 0).astype(np.int32)[None]
    ends = range(FULL_CACHE, length, FULL_CACHE)
    parts = (np.split(x, ends, axis=1) for x in (tokens, segments, positions))
    *earlier, following = zip(*parts, strict=True)
    options = np.float32(temperature), np.float32(top_p)
    key = jax.random.key(seed)
    for part in earlier:
        _, cache = _next(graphdef, params, *part, cache, key, *options)
    for number in range(max_tokens):
        own_key = jax.random.fold_in(key, number)
        token, cache = _next(graphdef, params, *following, cache, own_key, *options)
        if int(token) in stops:
            return
        yield int(token)
        position = np.array([[len(prompt) + number]], np.int32)
        following = np.array([[token]], np.int32), np.ones((1, 1), np.int32), position


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _next(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "1 T"],
    segments: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    cache: Cache,
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> tuple[Int[Array, ""], Cache]:
    model = nnx.merge(graphdef, params)
    hidden, cache = model.extend(tokens, segments, positions, cache)
    logits = jnp.matmul(model.head, hidden[0, -1], preferred_element_type=jnp.float32)
    if (cap := model.config.final_softcap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    return _draw(logits, key, temperature, top_p), cache


def _draw(
    logits: Float[Array, " V"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, ""]:
    def drawn() -> Int[Array, ""]:
        scaled = logits / temperature
        likely = jnp.sort(scaled, descending=True)
        before = jnp.cumsum(jax.nn.softmax(likely)) - jax.nn.softmax(likely)
        least = jnp.min(jnp.where(before < top_p, likely, jnp.inf))
        return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf))

    return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits)).astype(jnp.int32)


def pieces(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of tokens as it grows; a character of several tokens waits for the last of them."""
    seen: list[int] = []
    shown_so_far = ""
    for token in tokens:
        seen.append(token)
        text = decode(seen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown_so_far) :]
            shown_so_far = text
    if seen:
        yield decode(seen)[len(shown_so_far) :]


def _multiple(length: int) -> int:
    return math.ceil(length / FULL_CACHE) * FULL_CACHE
