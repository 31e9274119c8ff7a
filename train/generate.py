"""`python -m train.generate`: what a run's model, or any other, answers."""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m train.generate")  # the imports below take seconds

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from train import command_line
from train.data.records import Message
from train.flags import require, require_count, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Prints what the model answers to a prompt, word by word."""

    model: tyro.conf.Positional[Annotated[str, shown("RUN|MODEL")]]
    """A run's folder, or what --model can be in training."""
    prompt: Annotated[str, shown("TEXT")]
    """What the user says; - reads it from the standard input."""
    checkpoint: Annotated[str, shown("best|last|STEP")] = "last"
    """Which of a run: the one with the least held-out NLL, the newest, or that of a step."""
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
    """Decides what is drawn."""
    dtype: Annotated[str, shown("{float32,bfloat16}")] = "float32"
    """The dtype of activations and matmuls."""

    def __post_init__(self) -> None:
        require_count("max_tokens", self.max_tokens)
        require(
            0 <= self.temperature < float("inf"),
            f"--temperature must be finite and at least 0, not {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"--top-p must be in (0, 1], not {self.top_p}")
        require(0 <= self.seed < 2**32, f"--seed must be in [0, 2**32), not {self.seed}")
        require(self.dtype in ("float32", "bfloat16"), f"--dtype cannot be {self.dtype}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    try:
        options = command_line.read(GenerateOptions, "python -m train.generate", arguments)
        from train.models import families
        from train.models.generation import generate, pieces  # which take seconds to import
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
        context = families.positions(loaded.config_json) or math.inf
        require(
            len(prompt) <= context,
            f"--prompt has {len(prompt):,} tokens, more than the {context:,} positions that"
            f" {options.model} was made for: shorten it",
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
    except BrokenPipeError:
        raise  # nobody reads on
    except (ValueError, OSError) as error:
        print(f"python -m train.generate: {command_line.said(error)}", file=sys.stderr)
        return 2
    return 0


def _check_characters(text: str) -> None:
    """Raises ValueError for bytes that were not UTF-8, which Python keeps as halves of pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text[:60]!r} is not text in UTF-8") from None


if __name__ == "__main__":
    sys.exit(start.run(main))
