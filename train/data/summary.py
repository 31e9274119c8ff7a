"""What a run will learn from, shown before the first step: how much of what, and one example."""

from __future__ import annotations

import logging

import numpy as np
import rich.console
from rich.text import Text

from train.data.dataset import Data
from train.text.tokenizer import Example, Tokenizer

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 600
"""Shown of a stretch of the example; a longer one loses its middle."""


def log(data: Data) -> None:
    """What was read, left out, cut, and has loss: of all, and where there are several of each file.

    The rest of a file's line is its share of what is trained on.
    """
    loader = data.train
    rows = f"{len(loader.rows):,} rows, {loader.rows.padding:.1%} padding"
    logger.info("data: %s; in %s", data.counts, rows)
    if len(data.files) == 1:
        return
    trained = [counts for counts in data.files if counts.train]
    whole = float(sum(share.weight for share in loader.shares))
    for counts in data.files:
        said = ""
        if counts in trained and len(loader.shares) > 1:
            share = loader.shares[trained.index(counts)]
            said = f"; {float(share.weight) / whole:.1%} of the rows trained on, has {share.rows:,}"
        logger.info("  %s: %s%s", counts.name, counts, said)


def show_example(data: Data, console: rich.console.Console) -> None:
    """Prints one training example as the model gets it; what has loss is green and in ⟦ ⟧."""
    console.print("one example; the loss is on what is in ⟦green⟧:", highlight=False)
    console.print(painted(data.tokenizer, data.example), soft_wrap=True)


def painted(tokenizer: Tokenizer, example: Example) -> Text:
    """The example as text, each stretch with loss in green brackets and the rest dim."""
    loss_mask = example.loss_mask.copy()
    loss_mask[:1] = False  # nothing comes before, so it is not predicted
    changes = np.flatnonzero(np.diff(loss_mask)) + 1
    text = Text()
    for tokens, has_loss in zip(
        np.split(example.tokens, changes), np.split(loss_mask, changes), strict=True
    ):
        if not len(tokens):
            continue
        said = tokenizer.decode(tokens.tolist(), skip_special=False)
        if len(said) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2
            said = f"{said[:half]} … {said[-half:]}"
        text.append(f"⟦{said}⟧" if has_loss[0] else said, "green" if has_loss[0] else "dim")
    return text
