"""From text to batches: `build` makes all the data of a run, `PackedLoader` serves the batches."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import grain
import numpy as np

from train.data import corpus, files, records
from train.data.encode import MIN_LENGTH, encode_records
from train.data.packing import Batch, Rows, pack
from train.data.records import Record
from train.text import bpe
from train.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_CHARACTERS_PER_TOKEN = 16
"""More than the mean of any text, so that no row of `max_length` tokens holds more text."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the records, for the user to see."""

    skipped: int
    """Bad records, left out before all that follows."""
    records: int
    """Read in all; each is one of the four that follow."""
    train: int
    held_out: int
    empty: int
    """Left out because a response is empty."""
    dropped: int
    """Left out because, cut to `max_length`, no response was left."""
    shortened: int
    """Of train and held_out together: those that lost tokens to `max_length`."""
    train_tokens: int
    """In the training rows, prompts included and padding not."""
    train_labels: int
    """Of these, tokens that the loss is taken on."""
    train_rows: int
    padding: float
    """The share of the training rows that is padding."""

    def __str__(self) -> str:
        lost = [
            f"{n} {what}"
            for n, what in (
                (self.skipped, "skipped, for they are bad"),
                (self.empty, "left out with an empty response"),
                (self.dropped, "dropped: no response within max_length"),
                (self.shortened, "shortened to max_length"),
            )
            if n
        ]
        return (
            f"{self.records} records: {self.train} train, {self.held_out} held out"
            + "".join(f", {part}" for part in lost)
            + f"; {self.train_tokens:,} tokens ({self.train_labels:,} with loss)"
            f" in {self.train_rows} rows, {self.padding:.1%} padding"
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """All that a run needs of its data."""

    tokenizer: Tokenizer
    train: PackedLoader
    held_out: Rows
    """The held-out records, packed as the training ones are; no rows when `held_out=0`."""
    held_out_records: list[Record]
    """The same, as they were read."""
    counts: Counts


def build(
    *,
    data: Sequence[str | Path],
    held_out: float,
    max_length: int,
    batch_size: int,
    vocab_size: int,
    seed: int,
    skip_bad_records: bool = False,
    cache_dir: Path | None = None,
) -> Data:
    """Reads or makes the records, divides them, trains the tokenizer and packs.

    Args:
      data: files (`files.read` says which); none means the default corpus, questions and answers
        from the documentation of Python's standard library.
      held_out: the share of records kept from training, divided as `records.split` says.
      max_length: tokens in a row; longer records are cut as `encode.encode_records` says.
      batch_size: rows in a batch of `Data.train`. For accumulation, ask for all the rows of an
        optimizer step and divide them.
      vocab_size: of the BPE, which is trained on the training records.
      seed: of the order of rows in each epoch.
      skip_bad_records: leave out what is bad in the files, and say what it was.
      cache_dir: where trained tokenizers are kept, `default_cache_dir()` if None.

    Raises:
      ValueError: for bad data or options, naming them.
    """
    if max_length < MIN_LENGTH:
        raise ValueError(f"{max_length=} must be at least {MIN_LENGTH} tokens")
    skipped: list[str] = []
    everything = (
        [r for path in data for r in files.read(path, skipped if skip_bad_records else None)]
        if data
        else corpus.standard_library_records()
    )
    empty = [record.source for record in everything if record.has_empty_response]
    usable = [record for record in everything if not record.has_empty_response]
    if not usable:
        raise ValueError(f"every response of the {len(everything)} records is empty")
    learned, kept_back = records.split(usable, held_out)

    tokenizer = bpe.train_or_load(
        list(_within_reach(learned, max_length)), cache_dir or default_cache_dir(), vocab_size
    )
    encoded = encode_records(tokenizer, learned + kept_back, max_length)
    train = [example for example in encoded[: len(learned)] if example is not None]
    evaluation = [example for example in encoded[len(learned) :] if example is not None]
    dropped = [
        record.source
        for record, example in zip(learned + kept_back, encoded, strict=True)
        if example is None
    ]
    for what, names in (
        ("skipped, for they are bad", skipped),
        ("left out, for a response is empty", empty),
        (f"dropped, for their prompts leave no room for a response in {max_length=}", dropped),
    ):
        if names:
            logger.warning("%d record(s) %s:%s", len(names), what, _some(names))
    if not train:
        raise ValueError(f"no training record has a response within {max_length=}: use longer rows")

    rows = pack(train, max_length)
    return Data(
        tokenizer=tokenizer,
        train=PackedLoader(rows, batch_size, seed),
        held_out=pack(evaluation, max_length),
        held_out_records=kept_back,
        counts=Counts(
            skipped=len(skipped),
            records=len(everything),
            train=len(train),
            held_out=len(evaluation),
            empty=len(empty),
            dropped=len(dropped),
            shortened=sum(example.removed > 0 for example in train + evaluation),
            train_tokens=int(np.count_nonzero(rows.segments)),
            train_labels=int(np.count_nonzero(rows.labels >= 0)),
            train_rows=len(rows),
            padding=float(np.mean(rows.segments == 0)),
        ),
    )


def _within_reach(train: Sequence[Record], max_length: int) -> Iterator[str]:
    """The texts that a vocabulary is for: of each record, what `max_length` tokens may hold."""
    for record in train:
        left = max_length * MAX_CHARACTERS_PER_TOKEN
        for message in record.messages:
            if left > 0:
                yield message.content[:left]
            left -= len(message.content)


class PackedLoader:
    """Batches of packed rows without end, in an order that `seed` decides.

    Each epoch is all the rows once in a new order. A batch that reaches the end of an epoch takes
    its other rows from the next, so none is left out and every batch has `batch_size` rows.

    `state()` says where the loader is, in a dict of numbers and strings fit for JSON. A loader of
    the same rows, batch size and seed, in this process or another, that is given it by `set_state`
    goes on with exactly the batches that this one would have given next.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}")
        if not len(rows):
            raise ValueError("there are no rows to load")
        self.rows = rows
        self.batch_size = batch_size
        self._identity = _identity(rows, batch_size, seed)
        epochs = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        # Nothing remains of an endless sequence; but to keep what does, grain would overflow.
        indices = epochs.batch(batch_size, drop_remainder=True)
        # The rows are in memory: threads that read ahead would only add to what can go wrong.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(indices.map(lambda i: rows[i]).to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def steps(self, epochs: float) -> int:
        """The fewest batches that hold all rows at least `epochs` times."""
        rows = Fraction(str(epochs)) * len(self.rows)  # as it is written: 1.1 · 10 rows are 11
        return math.ceil(rows / self.batch_size)

    def epochs(self, steps: int) -> float:
        """How many times over `steps` batches hold all the rows."""
        return steps * self.batch_size / len(self.rows)

    def state(self) -> dict[str, Any]:
        return {"identity": self._identity, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          ValueError: if it was taken from a loader of other rows, batch size or seed.
        """
        if state["identity"] != self._identity:
            raise ValueError(
                "the saved position belongs to other data: to resume, the data files, the Python"
                " version (for the default data), max_length, batch size and seed must be the same"
            )
        self._iterator.set_state(state["iterator"])


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lsce`, or `~/.cache/lsce`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsce"


def _identity(rows: Rows, batch_size: int, seed: int) -> str:
    digest = hashlib.blake2b(f"{rows.tokens.shape} {batch_size} {seed}".encode(), digest_size=16)
    for array in (rows.tokens, rows.labels, rows.segments):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _some(names: Sequence[str], most: int = 20) -> str:
    rest = [f"and {len(names) - most} more"] if len(names) > most else []
    return "".join(f"\n  {name}" for name in [*names[:most], *rest])
