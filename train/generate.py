"""`python -m train.generate`: what a run's model, or any other, answers."""

from __future__ import annotations

if __name__ == "__main__":
    from train import start

    start.begin("python -m train.generate")  # the imports below take seconds

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.data.records import Message
from train.flags import require, require_count, shown
from train.models.cache import Cache
from train.models.decoder import Decoder

FULL_CACHE = 256
"""Sizes of caches and prompts are multiples of it, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Prints what the model answers to a prompt, word by word."""

    model: tyro.conf.Positional[Annotated[str, shown("RUN|MODEL")]]
    """A run's folder, or what --model can be in training."""
    prompt: Annotated[str, shown("TEXT")]
    """What the user says; - reads it from the standard input."""
    checkpoint: Annotated[str, shown("best|last|STEP")] = "last"
    """Of a run: the one with the least held-out NLL, the newest, or that of a step."""
    system: Annotated[str | None, shown("TEXT", "none")] = None
    """What the system says before."""
    raw: bool = False
    """Go on with the prompt as plain text, without a chat template."""
    template: Annotated[str, shown("NAME")] = "auto"
    """Chat template, as in training."""
    max_tokens: Annotated[int, shown("N")] = 256
    """Tokens at most; the end of the turn comes before, if the model says so."""
    temperature: Annotated[float, shown("T")] = 0.0
    """0 takes the likeliest token each time; 1 draws from the model's own probabilities."""
    top_p: Annotated[float, shown("P")] = 1.0
    """Draw among the likeliest tokens that have this share of the probability together."""
    seed: int = 0
    """Of what is drawn."""
    dtype: Annotated[str, shown("{float32,bfloat16}")] = "float32"
    """Of activations and matmuls."""

    def __post_init__(self) -> None:
        require_count("max_tokens", self.max_tokens)
        require(
            0 <= self.temperature < float("inf"),
            f"--temperature must be finite and at least 0, not {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"--top-p must be in (0, 1], not {self.top_p}")
        require(0 <= self.seed < 2**32, f"--seed must be in [0, 2**32), not {self.seed}")
        require(self.dtype in ("float32", "bfloat16"), f"--dtype cannot be {self.dtype}")


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
    key = jax.random.key(seed)
    for number in range(max_tokens):
        token, cache = _next(
            graphdef,
            params,
            tokens,
            segments,
            positions,
            cache,
            jax.random.fold_in(key, number),
            jnp.float32(temperature),
            jnp.float32(top_p),
        )
        if int(token) in stops:
            return
        yield int(token)
        tokens, segments = np.array([[token]], np.int32), np.ones((1, 1), np.int32)
        positions = np.array([[len(prompt) + number]], np.int32)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        options = tyro.cli(GenerateOptions, prog="python -m train.generate", args=arguments)
        from train.run import model as run_model

        loaded = run_model.read(
            options.model,
            dtype=options.dtype,
            template=options.template,
            checkpoint=options.checkpoint,
        )
        text = sys.stdin.read() if options.prompt == "-" else options.prompt
        said = [Message("system", options.system)] if options.system else []
        for words in (text, options.system or ""):
            _check_characters(words)
        prompt = (
            loaded.tokenizer.encode_text(text)
            if options.raw
            else loaded.tokenizer.encode_prompt([*said, Message("user", text)])
        )
        tokens = generate(
            loaded.model,
            prompt,
            stops=loaded.tokenizer.stops,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        for piece in pieces(tokens, loaded.tokenizer.decode):
            print(piece, end="", flush=True)
        print()
    except (ValueError, OSError) as error:
        print(f"python -m train.generate: {error}", file=sys.stderr)
        return 2
    return 0


def _check_characters(text: str) -> None:
    """Raises ValueError for bytes that were not UTF-8, which Python keeps as halves of pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text[:60]!r} is not text in UTF-8") from None


def _multiple(length: int) -> int:
    return -(-length // FULL_CACHE) * FULL_CACHE


if __name__ == "__main__":
    sys.exit(main())
