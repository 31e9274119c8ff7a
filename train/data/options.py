"""The flags of the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from train.data.encode import MIN_LENGTH
from train.data.sources import sources
from train.flags import require, require_share, shown
from train.text.bpe import MIN_VOCAB_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is learnt, and what is kept back to measure it by."""

    data: Annotated[tuple[Path, ...], shown("FILE ...", "Python's own documentation")] = ()
    """JSON lines, a JSON array (both may be .gz) or Parquet: chat, alpaca, ShareGPT, prompt and
    completion, or plain text. With weights, as in a.jsonl:2 b.jsonl:1, two rows of a are trained on
    for each of b."""
    eval_data: Annotated[tuple[Path, ...], shown("FILE ...", "a share of --data")] = ()
    """Files to evaluate on, in place of held-out records of --data."""
    skip_bad_records: bool = False
    """Leave out the records that cannot be read, and say which and why."""
    held_out: Annotated[float, shown("SHARE")] = 0.1
    """Share of the records kept out of training and evaluated on."""
    max_length: Annotated[int, shown("TOKENS")] = 256
    """Tokens in a packed row; longer records are cut."""
    vocab_size: Annotated[int, shown("TOKENS")] = 8192
    """Size of the byte-level BPE that is trained on the training records."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read, without their weights."""
        return tuple(path for paths in self.files_by_flag.values() for path in paths)

    @property
    def files_by_flag(self) -> dict[str, tuple[Path, ...]]:
        """The same, by the flag that names them."""
        trained = tuple(source.path for source in sources(self.data))
        return {"--data": trained, "--eval-data": self.eval_data}

    def __post_init__(self) -> None:
        sources(self.data)  # which refuses wrong weights
        require_share("held_out", self.held_out)
        require(
            self.vocab_size >= MIN_VOCAB_SIZE,
            f"--vocab-size must be at least {MIN_VOCAB_SIZE} (the bytes and the special tokens),"
            f" not {self.vocab_size}",
        )
        require(
            self.max_length >= MIN_LENGTH,
            f"--max-length must be at least {MIN_LENGTH} tokens, not {self.max_length}",
        )
