"""The tokenizer of a run that starts from nothing: a byte-level BPE trained on the training split.

A conversation is laid out as

    <|bos|> <|user|> question <|end|> <|assistant|> answer <|end|>

and the loss is taken where the model has to produce an answer or the <|end|> that closes it. Plain
text is laid out as <|bos|> text <|end|>.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tokenizers

from train.data.progress import progress
from train.data.records import Message, Record
from train.text.tokenizer import Example

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


class BPE:
    """A byte-level BPE. Every string can be encoded, and `decode(encode_text(text)) == text`.

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

    @property
    def stops(self) -> frozenset[int]:
        return frozenset({self.end})

    def encode(self, records: Sequence[Record]) -> list[Example]:
        """Each record whole, on all cores."""
        contents = iter(self.encode_texts([m.content for r in records for m in r.messages]))
        return [
            self._lay_out(record.messages, [next(contents) for _ in record.messages])
            for record in records
        ]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        tokens = [self.bos]
        for message in messages:
            tokens += [*self._opening(message), *self.encode_text(message.content), self.end]
        return [*tokens, self.assistant]

    def encode_text(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def _lay_out(self, messages: Sequence[Message], contents: Sequence[list[int]]) -> Example:
        tokens, loss_mask = [self.bos], [False]
        shortenable, responded = (0, 0), False
        for message, content in zip(messages, contents, strict=True):
            opening = self._opening(message)
            start = len(tokens) + len(opening)
            responded |= message.has_loss
            if not responded and len(content) > shortenable[1] - shortenable[0]:
                shortenable = start, start + len(content)
            tokens += [*opening, *content, self.end]
            loss_mask += [False] * len(opening) + [message.has_loss] * (len(content) + 1)
        return Example(np.array(tokens, np.int32), np.array(loss_mask, bool), shortenable)

    def _opening(self, message: Message) -> list[int]:
        return [] if message.role == "text" else [getattr(self, message.role)]

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        return self._bpe.decode(list(tokens), skip_special_tokens=skip_special)

    def to_json(self) -> str:
        """The tokenizer as the `tokenizers` library's own JSON."""
        return self._bpe.to_str()

    @classmethod
    def from_json(cls, text: str) -> BPE:
        return cls(tokenizers.Tokenizer.from_str(text))


def train(texts: Iterable[str], vocab_size: int = 8192) -> BPE:
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
    return BPE(bpe)


def train_or_load(texts: Sequence[str], cache_dir: Path, vocab_size: int = 8192) -> BPE:
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
            return BPE.from_json(path.read_text(encoding="utf-8"))
        except Exception:  # the library raises plain Exception for a damaged file
            path.unlink(missing_ok=True)
    with progress("training the vocabulary"):
        tokenizer = train(texts, vocab_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False, suffix=".tmp") as file:
            file.write(tokenizer.to_json().encode())
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("the tokenizer is not kept for the next run: %s", error)
    return tokenizer
