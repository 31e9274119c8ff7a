"""Text to tokens and back: a byte-level BPE trained on the training split, and the chat layout.

A conversation is laid out as

    <|bos|> <|user|> question <|end|> <|assistant|> answer <|end|>

and the loss is taken where the model has to produce an answer or the <|end|> that closes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from train.data.records import Message, Record

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MIN_LENGTH = 8
"""Room for the special tokens of one question and answer, and a token of each."""


class Tokenizer:
    """A byte-level BPE. Every string can be encoded, and `decode(encode(text)) == text`.

    The special tokens have the ids 0 to 5. They are never the encoding of a text: "<|end|>" written
    by a user is seven ordinary characters.
    """

    pad, bos, end, system, user, assistant = range(len(SPECIAL_TOKENS))

    def __init__(self, bpe: tokenizers.Tokenizer):
        for token_id, token in enumerate(SPECIAL_TOKENS):
            if bpe.token_to_id(token) != token_id:
                raise ValueError(f"not a tokenizer of this project: {token!r} is not id {token_id}")
        bpe.encode_special_tokens = True  # the library's name for "special tokens are plain text"
        self._bpe = bpe

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        return self._bpe.decode(list(tokens), skip_special_tokens=skip_special)

    def to_json(self) -> str:
        """The tokenizer as the `tokenizers` library's own JSON."""
        return self._bpe.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        return cls(tokenizers.Tokenizer.from_str(text))


def train(texts: Iterable[str], vocab_size: int = 8192) -> Tokenizer:
    """Trains a byte-level BPE; small data can give fewer than `vocab_size` tokens.

    Raises:
      ValueError: if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, got {vocab_size}")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(bpe)


def train_or_load(texts: Sequence[str], cache_dir: Path, vocab_size: int = 8192) -> Tokenizer:
    """`train`, or what it gave before for the same texts, size and `tokenizers` version.

    The file is written beside its final name and moved there, so that a reader never sees half of
    it, and two processes that train at once leave one whole file. A file that does not load is
    trained again and replaced.
    """
    key = hashlib.blake2b(f"{version('tokenizers')} {vocab_size}".encode(), digest_size=16)
    for text in texts:
        data = text.encode()
        key.update(len(data).to_bytes(8, "little") + data)
    path = Path(cache_dir) / f"bpe-{key.hexdigest()}.json"
    if path.exists():
        try:
            return Tokenizer.from_json(path.read_text(encoding="utf-8"))
        except Exception:  # the library raises plain Exception for a damaged file
            path.unlink(missing_ok=True)
    tokenizer = train(texts, vocab_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False, suffix=".tmp") as file:
            file.write(tokenizer.to_json().encode())
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("the tokenizer is not kept for the next run: %s", error)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One record as tokens. `loss_mask[i]` says whether predicting `tokens[i]` is trained."""

    tokens: Int[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    removed: int = 0
    """How many tokens were cut away to make it fit."""


def encode_record(tokenizer: Tokenizer, record: Record, max_length: int) -> Example | None:
    """Encodes a record in at most `max_length` tokens, or gives None if no response is left.

    A record that is too long loses the end of its prompt first, as far as that makes room for the
    response, or for half of `max_length` of it; but never more than half of the prompt, since an
    answer to a question that cannot be seen teaches the model to guess. Then it loses its own end.
    """
    return encode_records(tokenizer, [record], max_length)[0]


def encode_records(
    tokenizer: Tokenizer, records: Sequence[Record], max_length: int
) -> list[Example | None]:
    """`encode_record` for many records, on all cores."""
    if max_length < MIN_LENGTH:
        raise ValueError(f"max_length must be at least {MIN_LENGTH} tokens, got {max_length}")
    contents = iter(tokenizer.encode_batch([m.content for r in records for m in r.messages]))
    return [
        _fit(tokenizer, record.messages, [next(contents) for _ in record.messages], max_length)
        for record in records
    ]


def _fit(
    tokenizer: Tokenizer,
    messages: tuple[Message, ...],
    contents: list[list[int]],
    max_length: int,
) -> Example | None:
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    length = 1 + sum(len(content) + 2 for content in contents)
    start = 2 + sum(len(content) + 2 for content in contents[:first])  # of the first response
    if length > max_length and first > 0:
        room = min(len(contents[first]) + 1, max_length // 2)
        longest = max(range(first), key=lambda i: len(contents[i]))
        cut = min(max(start + room - max_length, 0), len(contents[longest]) // 2)
        contents[longest] = contents[longest][: len(contents[longest]) - cut]

    tokens, loss_mask = [tokenizer.bos], [False]
    for message, content in zip(messages, contents, strict=True):
        tokens += [getattr(tokenizer, message.role), *content, tokenizer.end]
        loss_mask += [False] + [message.role == "assistant"] * (len(content) + 1)
    kept = slice(max_length)
    if not any(loss_mask[kept]):
        return None
    return Example(
        np.array(tokens[kept], np.int32),
        np.array(loss_mask[kept], bool),
        removed=length - len(tokens[kept]),
    )
