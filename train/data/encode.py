"""Records to examples that fit a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.data.progress import progress
from train.data.records import Record
from train.text.tokenizer import Example, Tokenizer

MIN_LENGTH = 8
"""Room for the special tokens of one question and answer, and a token of each."""
AT_A_TIME = 1000
"""Records encoded whole at a time, and cut before the next: whole, they may be long."""


def encode_records(
    tokenizer: Tokenizer, records: Sequence[Record], max_length: int
) -> list[Example | None]:
    """Encodes each record in at most `max_length` tokens; None where no response is left.

    A record that is too long loses the end of its prompt first, as far as that makes room for the
    response, or for half of `max_length` of it; but never more than half of the prompt, since an
    answer to a question that cannot be seen teaches the model to guess. Then it loses its own end.
    """
    if max_length < MIN_LENGTH:
        raise ValueError(f"max_length must be at least {MIN_LENGTH} tokens, got {max_length}")
    encoded: list[Example | None] = []
    with progress("encoding records", len(records)) as advance:
        for start in range(0, len(records), AT_A_TIME):
            some = records[start : start + AT_A_TIME]
            encoded += [_fit(example, max_length) for example in tokenizer.encode(some)]
            advance(len(some))
    return encoded


def _fit(example: Example, max_length: int) -> Example | None:
    tokens, loss_mask = example.tokens, example.loss_mask
    if len(tokens) > max_length:
        kept = np.arange(len(tokens))
        first = int(np.argmax(loss_mask))  # of the first response
        response = int(np.argmin(np.append(loss_mask[first:], False)))
        start, end = example.shortenable
        missing = max(first + min(response, max_length // 2) - max_length, 0)
        cut = min(missing, (end - start) // 2)
        kept = np.delete(kept, slice(end - cut, end))[:max_length]
        tokens, loss_mask = tokens[kept], loss_mask[kept]
    if not loss_mask.any():
        return None
    return Example(tokens, loss_mask, removed=len(example.tokens) - len(tokens))
