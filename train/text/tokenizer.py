"""What the trainer asks of a tokenizer: records to tokens and loss mask, tokens to text.

There are two kinds: the byte-level BPE that a run trains itself (`train.text.bpe`) and a pretrained
model's, with its chat template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int

from train.data.records import Message, Record


@dataclasses.dataclass(frozen=True)
class Example:
    """One record as tokens. `loss_mask[t]` says whether predicting `tokens[t]` is trained."""

    tokens: Int[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    """Set by where a token stands, never by its id: an end of turn may have the id of padding."""
    shortenable: tuple[int, int] = (0, 0)
    """Start and end of the longest text before the first response, all of it plain text: where a
    prompt that leaves no room for its response loses tokens."""
    removed: int = 0
    """How many tokens were cut away to make it fit."""
    untold: int = 0
    """How many turns to learn have no loss, as the template does not let it be told where they
    are."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def stops(self) -> frozenset[int]:
        """The tokens of which each ends what the assistant says."""
        ...

    def encode(self, records: Sequence[Record]) -> list[Example]:
        """Each record whole, however long.

        The loss is on what the assistant says where `Message.has_loss`, and on the one token that
        ends its turn. A record of plain text (`Record.is_text`) is laid out without a template, as
        in pre-training, and all of it has loss.
        """
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The conversation so far, up to where the assistant's next words begin."""
        ...

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str: ...

    def to_json(self) -> str:
        """All of it, for the run's folder."""
        ...
