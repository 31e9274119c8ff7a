"""The tokenizer of a checkpoint, with its chat template: `train.text.tokenizer.Tokenizer`."""

from __future__ import annotations

import json
import logging
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from train.data.records import Message, Record
from train.flags import require
from train.text import from_gguf
from train.text.chat import BUILT_IN, MARKS, Rendered, Template
from train.text.tokenizer import Example

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
ANSWER = "Yes"
"""To a question, to see what the template makes of it."""


class PretrainedTokenizer:
    """Text to tokens and back, as the checkpoint was trained on.

    Special tokens that are written in a message are special, as for the tools that the checkpoint
    came from.

    Args:
      tokenizer: of the `tokenizers` library.
      special: the texts of bos_token, eos_token and pad_token, as far as there are.
      stops: ids that end what the model says, besides the end of a turn in the template.
      template: the checkpoint's own; None if it has none.
      choose: "auto" for its own, or the one of its family if its tokenizer has that one's tokens,
        or else alpaca's; or a name of `chat.BUILT_IN`.
      where: the checkpoint, for messages.
      generation: what its generation_config.json says.

    Raises:
      ValueError: for a template that is not valid, that needs tokens which are not there, or that
        ends an answer without a token to stop at.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special: Mapping[str, str],
        *,
        stops: Iterable[int],
        template: str | None,
        choose: str = "auto",
        where: str,
        generation: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        self.generation = generation
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = dict(special)
        self._where = where
        self.rows: int | None = None
        self._beyond: dict[int, str] = {}
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.pad = tokenizer.token_to_id(special.get("pad_token", "")) or 0
        eos = tokenizer.token_to_id(special.get("eos_token", ""))
        known = set(stops) if eos is None else {*stops, eos}
        start = self._tokenizer.encode("").tokens
        variables = {"bos_token": "", "eos_token": "", **special, "text_start": "".join(start)}
        self.template = Template(self._choose(template, choose), where, variables)
        self.stops = frozenset(known | self._end_of_turn(known))

    @classmethod
    def from_folder(cls, folder: Path, choose: str = "auto") -> Self:
        """From a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja.

        Raises:
          ValueError: naming the file that is missing or damaged.
        """
        file = folder / TOKENIZER
        if not file.is_file():
            hint = (
                ": tokenizer.model is not read, save the tokenizer once with transformers"
                if (folder / "tokenizer.model").is_file()
                else ""
            )
            raise ValueError(f"there is no {TOKENIZER} in {folder}{hint}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise ValueError(f"{file} is not a tokenizer: {error}") from None
        config = read_json(folder / CONFIG)
        template, special = config.get("chat_template"), {}
        try:
            if isinstance(template, list):  # several by name
                template = {t["name"]: t["template"] for t in template}.get("default")
            for name in ("bos_token", "eos_token", "pad_token"):
                token = config.get(name)
                if token:
                    special[name] = token if isinstance(token, str) else token["content"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG} is damaged: {error!r}") from None
        for name, text in {"chat_template": template or "", **special}.items():
            require(isinstance(text, str), f"{folder / CONFIG}: {name} must be text, not {text!r}")
        if (folder / TEMPLATE).is_file():
            try:
                template = (folder / TEMPLATE).read_text("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{folder / TEMPLATE} is not UTF-8: {error}") from None
        stops: set[int] = set()
        for source in ("config.json", GENERATION):
            said = read_json(folder / source)
            stops |= _ids(said, "eos_token_id", tokenizer, folder / source)
            _ids(said, "bos_token_id", tokenizer, folder / source)  # which exports say again
        return cls(
            tokenizer,
            special,
            stops=stops,
            template=template,
            choose=choose,
            where=str(folder),
            generation=read_json(folder / GENERATION),
        )

    @classmethod
    def from_gguf(cls, get: Any, path: Path, choose: str = "auto") -> Self:
        """From the metadata of a GGUF file, by key and default.

        Raises:
          ValueError: naming the file, if they hold none, one of a kind not known here, or a damaged
            one.
        """
        try:
            tokenizer = from_gguf.tokenizer(get, str(path))
        except ValueError:
            raise
        except Exception as error:  # the library raises plain Exception for what does not fit
            reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
            raise ValueError(f"{path}: its tokenizer is damaged: {reason}") from None
        template = get("tokenizer.chat_template", None)
        require(
            template is None or isinstance(template, str),
            f"{path}: tokenizer.chat_template must be text, not {template!r}",
        )
        ids = {
            name: get(f"tokenizer.ggml.{key}_token_id", None)
            for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
        }
        pad = ids["pad_token"]
        if type(pad) is not int or pad not in tokenizer.get_vocab().values():
            ids["pad_token"] = None  # some files have 2^32 − 1 where there is none
        return cls(
            tokenizer,
            {n: tokenizer.id_to_token(i) or "" for n, i in ids.items() if i is not None},
            stops=[] if ids["eos_token"] is None else [ids["eos_token"]],
            template=template,
            choose=choose,
            where=str(path),
        )

    def of_head(self, rows: int) -> Self:
        """Itself, for a model whose head has `rows` rows: nothing is encoded beyond them.

        Added tokens may lie there (Gemma 3's for images, which its text models have not): they are
        a fault of the text that holds one. `vocab_size` counts the tokens that have a row.

        Raises:
          ValueError: if tokens of its vocabulary lie there, or some that begin a text or that the
            template writes: it is another model's.
        """
        beyond = {i: t for t, i in self._tokenizer.get_vocab().items() if i >= rows}
        if not beyond.keys() <= self._tokenizer.get_added_tokens_decoder().keys():
            raise ValueError(
                f"{self._where}: the tokenizer has ids up to {max(beyond)}, and the head only"
                f" {rows} rows"
            )
        self.rows, self._beyond = rows, beyond
        if beyond:
            try:
                self.encode_text("")
                chat = self._answered().text
                self._within(self._tokenizer.encode(chat, add_special_tokens=False).ids)
            except ValueError as error:
                raise ValueError(f"{self._where}: in any conversation {error}") from None
            kept = (i for i in self._tokenizer.get_vocab().values() if i < rows)
            self.vocab_size = max(kept) + 1
            logger.info(
                "tokenizer: %d added token(s) have no row in the head, the first is %s (id %d);"
                " text that holds one is refused",
                len(beyond),
                beyond[min(beyond)],
                min(beyond),
            )
        return self

    def encode(self, records: Sequence[Record]) -> list[Example]:
        """Each record whole: see `train.text.tokenizer.Tokenizer`; on all cores.

        Raises:
          ValueError: naming a record that the template refuses, or that holds a token for which
            the head has no row.
        """
        rendered = []
        for record in records:
            try:
                rendered.append(None if record.is_text else self.template.spans(record.messages))
            except ValueError as error:
                raise ValueError(f"{record.source}: {error}") from None
        chats = iter(
            self._tokenizer.encode_batch(
                [chat.text for chat in rendered if chat is not None], add_special_tokens=False
            )
        )
        examples = []
        for record, chat in zip(records, rendered, strict=True):
            try:
                if chat is None:
                    examples.append(self._text(record.messages[0].content))
                else:
                    examples.append(self._chat(record.messages, chat, next(chats)))
            except ValueError as error:
                raise ValueError(f"{record.source}: {error}") from None
        return examples

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Raises ValueError if the template refuses them, or for a token without a row."""
        text = self.template.render(messages, prompt=True)
        return self._within(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_text(self, text: str, *, start: bool = True) -> list[int]:
        """Plain text as in pre-training, with the token that begins a text if there is one.

        Raises:
          ValueError: for a token without a row in the head.
        """
        return self._within(self._tokenizer.encode(text, add_special_tokens=start).ids)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` of each, on all cores; of a text that is refused, the error shows some."""
        found = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch(list(texts)), strict=True):
            try:
                found.append(self._within(encoding.ids))
            except ValueError as error:
                at = min(text.find(token) % (len(text) + 1) for token in self._beyond.values())
                around = text[max(at - 60, 0) : at + 60]
                raise ValueError(f"{error}: … {around!r} …") from None
        return found

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special)

    def to_json(self) -> str:
        """The tokenizer as the `tokenizers` library's own JSON."""
        return self._tokenizer.to_str()

    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json says beside tokenizer.json."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._special,
            "chat_template": self.template.source,
            "clean_up_tokenization_spaces": False,
        }

    def _choose(self, template: str | None, choose: str) -> str:
        if choose == "auto":
            if template:
                return template
            has = (name for name, marks in MARKS.items() if all(map(self._id, marks)))
            return BUILT_IN[next(has, "alpaca")]
        if choose not in BUILT_IN:
            raise ValueError(f"--template must be auto or one of {', '.join(BUILT_IN)}: {choose}")
        missing = [mark for mark in MARKS.get(choose, ()) if self._id(mark) is None]
        if missing:
            raise ValueError(f"--template {choose} needs {missing[0]}, which {self._where} has not")
        return BUILT_IN[choose]

    def _id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _within(self, tokens: list[int]) -> list[int]:
        """The tokens; ValueError for one beyond the head, where a gather would take its last."""
        if self._beyond and (found := next((i for i in tokens if i in self._beyond), None)):
            raise ValueError(
                f"the text holds the token {self._beyond[found]} (id {found}), for which the head,"
                f" of {self.rows} rows, has none"
            )
        return tokens

    def _answered(self) -> Rendered:
        """The shortest conversation."""
        return self.template.spans([Message("user", "Yes?"), Message("assistant", ANSWER)])

    def _end_of_turn(self, stops: set[int]) -> set[int]:
        """The first special token after an answer: an instruct model's end of turn."""
        chat = self._answered()
        start, end = chat.spans[1] or (0, 0)
        said = chat.text.find(ANSWER, start) + len(ANSWER)
        if said < len(ANSWER):
            raise ValueError(f"the chat template of {self._where} leaves out what is answered")
        added = self._tokenizer.get_added_tokens_decoder()
        for token in self._tokenizer.encode(chat.text[said:end], add_special_tokens=False).ids:
            if token in stops or (token in added and added[token].special):
                return {token}
        raise ValueError(
            f"the chat template of {self._where} ends an answer without a token to stop at"
        )

    def _text(self, text: str) -> Example:
        tokens = self.encode_text(text)
        eos = self._id(self._special.get("eos_token", ""))
        tokens = self._within(tokens + ([] if eos is None else [eos]))
        return Example(np.array(tokens, np.int32), np.ones(len(tokens), bool))

    def _chat(
        self, messages: Sequence[Message], chat: Rendered, encoding: tokenizers.Encoding
    ) -> Example:
        tokens = np.array(self._within(encoding.ids), np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        mask = np.zeros(len(tokens), bool)
        for message, span in zip(messages, chat.spans, strict=True):
            if span and message.has_loss:
                turn = np.flatnonzero((offsets[:, 0] >= span[0]) & (offsets[:, 0] < span[1]))
                ends = np.flatnonzero(np.isin(tokens[turn], list(self.stops)))
                mask[turn[: ends[-1] + 1] if len(ends) else turn] = True
        spans = zip(messages, chat.spans, strict=True)
        return Example(
            tokens,
            mask,
            self._shortenable(messages, chat.text, offsets),
            untold=sum(message.has_loss and span is None for message, span in spans),
        )

    @staticmethod
    def _shortenable(
        messages: Sequence[Message], text: str, offsets: np.ndarray
    ) -> tuple[int, int]:
        """The tokens of the longest message before the first response."""
        first = next(i for i, message in enumerate(messages) if message.has_loss)
        longest = max(messages[:first], key=lambda m: len(m.content), default=None)
        content = longest.content.strip() if longest else ""
        start = text.find(content)
        if not content or start < 0:
            return 0, 0
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= start + len(content))
        where = np.flatnonzero(inside)
        return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def _ids(
    said: Mapping[str, Any], key: str, tokenizer: tokenizers.Tokenizer, file: Path
) -> set[int]:
    """The ids of a config.json's field, which may be null, one or several."""
    value = said.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        # The library takes no other numbers. True is an int to Python.
        if type(i) is not int or not 0 <= i < 2**32 or tokenizer.id_to_token(i) is None:
            raise ValueError(
                f"{file}: {key} must be one id or several of {TOKENIZER}, whose last is"
                f" {max(tokenizer.get_vocab().values())}, not {i!r}: set it to the model's, or"
                " leave it out"
            )
    return set(ids)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is none; ValueError if it is something else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # the second: nested too deeply
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, not {type(found).__name__}")
    return found
