"""Records to examples that fit a row."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from train.data.progress import progress
from train.data.records import Record
from train.text.tokenizer import Example, Tokenizer

logger = logging.getLogger(__name__)

MIN_LENGTH = 8
"""Room for the special tokens of one question and answer, and a token of each."""
AT_A_TIME = 1000
"""Records encoded whole at a time, and cut before the next: whole, they may be long."""


def encode_records(
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_length: int,
    refused: dict[str, str] | None = None,
) -> list[list[Example]]:
    """Each record in examples of at most `max_length` tokens: one, or none without a response left.

    A conversation that is too long loses the end of its prompt first, as far as that makes room for
    the response, or for half of `max_length` of it; but never more than half of the prompt, since
    an answer to a question that cannot be seen teaches the model to guess. Then it loses its own
    end. Plain text loses nothing: it goes on in another example.

    Turns that have no loss, as a chat template does not let them be told, are said in a warning.

    Args:
      refused: takes the source of each record that the tokenizer's template refuses, and why, in
        place of an error; there is no example of it.

    Raises:
      ValueError: for a `max_length` that is too small, and what the tokenizer raises.
    """
    if max_length < MIN_LENGTH:
        raise ValueError(f"max_length must be at least {MIN_LENGTH} tokens, got {max_length}")
    encoded: list[list[Example]] = []
    untold, first = 0, ""
    with progress("encoding records", len(records)) as advance:
        for start in range(0, len(records), AT_A_TIME):
            some = records[start : start + AT_A_TIME]
            for record, example in zip(some, _encode(tokenizer, some, refused), strict=True):
                fit = _divide if record.is_text else _cut
                encoded.append(fit(example, max_length) if example else [])
                if example and example.untold:
                    untold, first = untold + example.untold, first or record.source
            advance(len(some))
    if untold:
        logger.warning(
            "%d turn(s) of the assistant have no loss, of which the first is in %s: the chat"
            " template writes them otherwise than as the last turn, and does not let it be told"
            " where they are",
            untold,
            first,
        )
    return encoded


def _encode(
    tokenizer: Tokenizer, records: Sequence[Record], refused: dict[str, str] | None
) -> Sequence[Example | None]:
    """All at once; where one is refused, one by one."""
    try:
        return tokenizer.encode(records)
    except ValueError as error:
        if refused is None:
            raise
        if len(records) == 1:
            refused[records[0].source] = str(error)
            return [None]
    return [example for record in records for example in _encode(tokenizer, [record], refused)]


def _cut(example: Example, max_length: int) -> list[Example]:
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
        return []
    return [Example(tokens, loss_mask, removed=len(example.tokens) - len(tokens))]


def _divide(example: Example, max_length: int) -> list[Example]:
    """Every token is predicted once: a part begins with the token that the one before ends with."""
    parts = []
    for start in range(0, max(len(example.tokens) - 1, 1), max_length - 1):
        loss_mask = example.loss_mask[start : start + max_length].copy()
        loss_mask[0] = False  # nothing in its row comes before
        if loss_mask.any():
            parts.append(Example(example.tokens[start : start + max_length], loss_mask))
    return parts
