"""The tokenizer inside a GGUF file, as one of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

CONTROL, USER_DEFINED = 3, 4

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = _split(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}
"""How text falls apart before its pieces are merged, by `tokenizer.ggml.pre`."""


def tokenizer(get: Callable[[str, Any], Any], where: str) -> tokenizers.Tokenizer:
    """Builds the tokenizer that a file's metadata describe.

    Encoding with special tokens puts the beginning of a text first where the file says so.

    Args:
        get: the metadata, by key and default.
        where: the file, for messages.

    Raises:
      ValueError: for a kind of tokenizer that is not known here, and for an id of no token.
    """

    def field(name: str, default: Any = None) -> Any:
        return get(f"tokenizer.ggml.{name}", default)

    tokens, kinds = field("tokens"), field("token_type")
    if not tokens:
        raise ValueError(f"{where} holds no tokenizer")
    for name in ("bos", "eos"):
        i = field(f"{name}_token_id")
        if i is not None and (type(i) is not int or i not in range(len(tokens))):
            raise ValueError(
                f"{where}: tokenizer.ggml.{name}_token_id must be one of its {len(tokens)} tokens,"
                f" not {i!r}: take another file of the model"
            )
    model, merges = field("model"), field("merges")
    if model == "gpt2":
        found = _byte_level(tokens, merges or [], field("pre", "default"), where)
    elif model == "llama":
        gemma = str(get("general.architecture", "")).startswith("gemma")
        ranks = range(len(tokens)) if gemma else [-score for score in field("scores")]
        prefix = not gemma and field("add_space_prefix", True)
        found = _sentencepiece(tokens, merges, ranks, prefix, where)
    else:
        raise ValueError(f"{where}: tokenizer {model!r} is not known here; gpt2 and llama are")
    known = found.get_vocab()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, of_kind in zip(tokens, kinds or [], strict=False)
            if of_kind == kind and token in known
        ]
        (found.add_special_tokens if special else found.add_tokens)(added)
    bos = field("bos_token_id")
    if bos is not None and field("add_bos_token", model == "llama"):
        token = tokens[bos]
        found.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
        )
    return found


def _byte_level(
    tokens: Sequence[str], merges: Sequence[str], split: str, where: str
) -> tokenizers.Tokenizer:
    if split not in SPLITS:
        raise ValueError(
            f"{where}: how its tokenizer {split!r} splits text is not known here: take the model's"
            " Hugging Face folder, which has a tokenizer.json"
        )
    known = {token: i for i, token in enumerate(tokens)}
    found = tokenizers.Tokenizer(models.BPE(known, _pairs(merges, known, where)))
    found.pre_tokenizer = SPLITS[split]
    found.decoder = decoders.ByteLevel()
    return found


def _sentencepiece(
    tokens: Sequence[str],
    merges: Sequence[str] | None,
    ranks: Sequence[float],
    prefix: bool,
    where: str,
) -> tokenizers.Tokenizer:
    """BPE over characters, with bytes for those it has not, and ▁ for a space.

    Where the file has no merges they are all the ways to join two tokens to a third, the best third
    first: by its score, or in Gemma by its number.
    """
    # Gemma's file spells tokens of spaces alone with spaces.
    spelled = ["▁" * len(t) if " " in t and not t.strip() else t for t in tokens]
    known = {token: i for i, token in enumerate(spelled)}
    if merges is None:
        pairs = [
            (token[:cut], token[cut:])
            for i in sorted(range(len(spelled)), key=ranks.__getitem__)
            for token in (spelled[i],)
            for cut in range(len(token) - 1, 0, -1)
            if token[:cut] in known and token[cut:] in known
        ]
    else:
        pairs = _pairs(merges, known, where)
    found = tokenizers.Tokenizer(
        models.BPE(known, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        found.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        back.append(decoders.Strip(" ", 1, 0))
    else:
        found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Sequence(back)
    return found


def _pairs(merges: Sequence[str], known: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """The tokens that each merge joins. The library would panic where they, or the joined, are
    none."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in known or right not in known or left + right not in known:
            raise ValueError(
                f"{where}: its tokenizer is damaged: no tokens for the merge {merge!r}"
            )
        pairs.append((left, right))
    return pairs
