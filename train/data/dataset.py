"""From files to all the data of a run: read, divide, encode, pack, and count what became of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from train.data import corpus, files, mixture, records, sources
from train.data.encode import MIN_LENGTH, encode_records
from train.data.loader import PackedLoader, digest
from train.data.packing import Rows, pack
from train.data.records import Record
from train.files import default_cache_dir
from train.text import bpe
from train.text.tokenizer import Example, Tokenizer

logger = logging.getLogger(__name__)

MAX_CHARACTERS_PER_TOKEN = 16
"""More than the mean of any text, so that no row of `max_length` tokens holds more text."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the records, for the user to see."""

    name: str = "all"
    """The file's name."""
    skipped: int = 0
    """Bad records, left out before all that follows."""
    records: int = 0
    """Read in all; each is one of the four that follow."""
    train: int = 0
    held_out: int = 0
    empty: int = 0
    """Left out because a response is empty."""
    dropped: int = 0
    """Left out because, cut to `max_length`, no response was left."""
    shortened: int = 0
    """Records, of train and held_out together, that lost tokens to `max_length`."""
    train_tokens: int = 0
    """In the training rows, prompts included and padding not."""
    train_labels: int = 0
    """Those of these tokens that the loss is taken on."""

    def __add__(self, other: Counts) -> Counts:
        sums = {
            name: value + getattr(other, name)
            for name, value in vars(self).items()
            if name != "name"
        }
        return Counts(**sums)

    def __str__(self) -> str:
        lost = [
            f"{n:,} {what}"
            for n, what in (
                (self.skipped, "skipped, for they are bad"),
                (self.empty, "left out with an empty response"),
                (self.dropped, "dropped: no response within max_length"),
                (self.shortened, "shortened to max_length"),
            )
            if n
        ]
        return (
            f"{self.records:,} records: {self.train:,} train, {self.held_out:,} held out"
            + "".join(f", {part}" for part in lost)
            + (
                f"; {self.train_tokens:,} tokens, {self.train_labels:,} with loss"
                f" ({self.train_labels / self.train_tokens:.0%})"
                if self.train_tokens
                else ""
            )
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """All that a run needs of its data."""

    tokenizer: Tokenizer
    train: PackedLoader
    held_out: Rows
    """The held-out records, packed as the training ones are; no rows where none are held out."""
    held_out_records: list[Record]
    """The same, as they were read."""
    files: tuple[Counts, ...]
    """What became of the records of each file."""
    example: Example
    """The first that is trained on, to look at."""

    @property
    def counts(self) -> Counts:
        """The counts of all files together."""
        return sum(self.files, Counts())

    def position(self) -> dict[str, Any]:
        """Where the training rows are, fit for JSON, and what is held out."""
        return {**self.train.state(), "held_out": digest(self.held_out)}

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on where `position` was taken.

        Raises:
          ValueError: if it is of other training rows, as `PackedLoader.set_state` says, or of other
            held-out ones: the scores before and after would be of different questions, and the best
            checkpoint one of the easier ones.
        """
        self.train.set_state(position)
        if position.get("held_out", digest(self.held_out)) != digest(self.held_out):
            raise ValueError(
                "the saved position belongs to other held-out records: to resume, those of --data"
                " or --eval-data must be the same, so that scores can be compared"
            )


@dataclasses.dataclass
class _File:
    """The records of a file, and what becomes of them."""

    name: str
    records: list[Record]
    skip_bad: bool = False
    skipped: list[str] = dataclasses.field(default_factory=list)
    """What was wrong with each bad record."""
    weight: Fraction | None = None
    train: list[Example] = dataclasses.field(default_factory=list)
    held_out: list[Example] = dataclasses.field(default_factory=list)
    counts: Counts = Counts()
    dropped: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, path: Path, skip_bad: bool, weight: Fraction | None = None) -> Self:
        skipped: list[str] = []
        records = files.read(path, skipped if skip_bad else None)
        return cls(path.name, records, skip_bad, skipped, weight)

    @property
    def usable(self) -> list[Record]:
        return [record for record in self.records if not record.has_empty_response]

    @property
    def empty(self) -> list[str]:
        return [record.source for record in self.records if record.has_empty_response]

    def encode(self, tokenizer: Tokenizer, max_length: int, held_out: set[int]) -> None:
        """Makes the examples, given which records (by `id`) are held out."""
        refused: dict[str, str] = {}
        usable = self.usable
        encoded = encode_records(tokenizer, usable, max_length, refused if self.skip_bad else None)
        self.skipped += refused.values()
        self.records = [record for record in self.records if record.source not in refused]
        train, kept_back, shortened = 0, 0, 0
        for record, examples in zip(usable, encoded, strict=True):
            if record.source in refused:
                continue
            if not examples:
                self.dropped.append(record.source)
                continue
            is_held_out = id(record) in held_out
            (self.held_out if is_held_out else self.train).extend(examples)
            train, kept_back = train + (not is_held_out), kept_back + is_held_out
            shortened += any(example.removed for example in examples)
        self.counts = Counts(
            name=self.name,
            skipped=len(self.skipped),
            records=len(self.records),
            train=train,
            held_out=kept_back,
            empty=len(self.empty),
            dropped=len(self.dropped),
            shortened=shortened,
            train_tokens=sum(len(example.tokens) for example in self.train),
            train_labels=sum(int(example.loss_mask[1:].sum()) for example in self.train),
        )


def build(
    *,
    data: Sequence[str | Path],
    held_out: float,
    max_length: int,
    batch_size: int,
    vocab_size: int,
    seed: int,
    eval_data: Sequence[str | Path] = (),
    tokenizer: Tokenizer | None = None,
    skip_bad_records: bool = False,
    cache_dir: Path | None = None,
) -> Data:
    """Reads or makes the records, divides them, trains the tokenizer and packs.

    Args:
      data: files (`files.read` says which), each with a weight or none (`sources.Source`); no file
        means the default corpus, questions and answers from the documentation of Python's standard
        library. Records of files with weights are packed file by file, else all together.
      held_out: the share of records kept from training, divided as `records.split` says.
      max_length: tokens in a row; longer records are cut as `encode.encode_records` says.
      batch_size: rows in a batch of `Data.train`. For accumulation, ask for all the rows of an
        optimizer step and divide them.
      vocab_size: of the BPE, which is trained on the training records.
      seed: of the order of rows in each epoch.
      eval_data: files of records to hold out, in place of a share of `data`.
      tokenizer: a pretrained model's, in place of a BPE.
      skip_bad_records: leave out what is bad in the files, and say what it was.
      cache_dir: where trained tokenizers are kept, `default_cache_dir()` if None.

    Raises:
      ValueError: for bad data or options, naming them.
    """
    if max_length < MIN_LENGTH:
        raise ValueError(f"{max_length=} must be at least {MIN_LENGTH} tokens")
    to_train = [
        _File.read(source.path, skip_bad_records, source.weight) for source in sources.sources(data)
    ] or [_File("Python's own documentation", corpus.standard_library_records())]
    to_evaluate = [_File.read(Path(path), skip_bad_records) for path in eval_data]

    learned = [record for file in to_train for record in file.usable]
    if not learned:
        total = sum(len(file.records) for file in to_train)
        raise ValueError(f"every response of the {total} records is empty")
    kept_back = [record for file in to_evaluate for record in file.usable]
    if eval_data:
        _warn_of_overlap(learned, kept_back)
    else:
        learned, kept_back = records.split(learned, held_out)

    if tokenizer is None:
        texts = list(_within_reach(learned, max_length))
        tokenizer = bpe.train_or_load(texts, cache_dir or default_cache_dir(), vocab_size)
    everything = [*to_train, *to_evaluate]
    held_out_ids = set(map(id, kept_back))
    for file in everything:
        file.encode(tokenizer, max_length, held_out_ids)
    _warn_of_losses(everything, max_length)
    for file in to_train:
        if not file.train and (file.weight or not any(other.train for other in to_train)):
            raise ValueError(
                f"{file.name}: no training record has a response within {max_length=}: use longer"
                " rows"
            )

    weighted = [file for file in to_train if file.weight]
    if weighted:
        parts = [pack(file.train, max_length) for file in weighted]
        shares = [
            mixture.Share(len(rows), file.weight or Fraction(1))
            for rows, file in zip(parts, weighted, strict=True)
        ]
    else:
        parts = [pack([example for file in to_train for example in file.train], max_length)]
        shares = None
    return Data(
        tokenizer=tokenizer,
        train=PackedLoader(Rows.concatenate(parts), batch_size, seed, shares),
        held_out=pack([example for file in everything for example in file.held_out], max_length),
        held_out_records=[r for file in everything for r in file.usable if id(r) in held_out_ids],
        files=tuple(file.counts for file in everything),
        example=next(example for file in to_train for example in file.train),
    )


def _within_reach(train: Sequence[Record], max_length: int) -> Iterator[str]:
    """The texts that a vocabulary is for: of each record, what `max_length` tokens may hold.

    Plain text goes on in the next row, so all of it is, but as many texts: BPE takes hours for one
    word without end.
    """
    reach = max_length * MAX_CHARACTERS_PER_TOKEN
    for record in train:
        if record.is_text:
            text = record.messages[0].content
            yield from (text[start : start + reach] for start in range(0, len(text), reach))
            continue
        left = reach
        for message in record.messages:
            if left > 0:
                yield message.content[:left]
            left -= len(message.content)


def _warn_of_overlap(train: Sequence[Record], evaluation: Sequence[Record]) -> None:
    known = {record.question for record in train}
    both = [record.source for record in evaluation if record.question in known]
    if both:
        logger.warning(
            "%d of %d record(s) of --eval-data ask what training records ask too:%s",
            len(both),
            len(evaluation),
            _some(both, 5),
        )


def _warn_of_losses(read: Sequence[_File], max_length: int) -> None:
    for what, names in (
        ("skipped, for they are bad", [name for file in read for name in file.skipped]),
        ("left out, for a response is empty", [name for file in read for name in file.empty]),
        (
            f"dropped, for their prompts leave no room for a response in {max_length=}",
            [name for file in read for name in file.dropped],
        ),
    ):
        if names:
            most = 20 if what.startswith("skipped") else 5  # of which each may have its own reason
            logger.warning("%d record(s) %s:%s", len(names), what, _some(names, most))


def _some(names: Sequence[str], most: int) -> str:
    rest = [f"and {len(names) - most} more"] if len(names) > most else []
    return "".join(f"\n  {name}" for name in [*names[:most], *rest])
