"""Questions as trees of tokens that fit the context, with as many solved examples as have room."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

from train.evaluation.items import Item
from train.evaluation.likelihood import Tree
from train.evaluation.prompts import Answer, Prompt, Worded, word
from train.evaluation.tasks import Page
from train.text.pretrained import PretrainedTokenizer

REMEMBERED = 16
"""Lists of texts: those of a few tasks, with as many examples as fit."""
TEXTS_AT_ONCE = 4096
"""Bounds the memory of the tokenizer's results."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A question as the model reads it."""

    tree: Tree
    shots: int
    """Solved examples that stand before it."""


def encode(
    tokenizer: PretrainedTokenizer,
    items: Mapping[int, Item],
    examples: Mapping[str, Sequence[Item]],
    page: Page,
    prompt: Prompt,
    answer: Answer,
    *,
    shots: int,
    max_length: int | None,
) -> dict[int, Encoded]:
    """The questions by index; those are missing that are too long even without examples.

    The examples are the first of the question's subject, itself left out. Where a prompt and its
    longest continuation have more than `max_length` tokens, the last examples go, one by one.

    Raises:
      ValueError: for a subject without enough examples.
    """
    before = {i: _examples(item, examples, shots) for i, item in items.items()}
    found: dict[int, Encoded] = {}
    waiting = list(items)
    for kept in range(shots, -1, -1):
        if not waiting:
            break
        texts = [word(items[i], before[i][:kept], page, prompt, answer) for i in waiting]
        encoded = dict(zip(waiting, trees(tokenizer, texts), strict=True))
        fitting = {i for i, tree in encoded.items() if fits(tree, max_length)}
        found |= {i: Encoded(encoded[i], min(kept, len(before[i]))) for i in fitting}
        waiting = [i for i in waiting if i not in fitting]
    return found


def fits(tree: Tree, max_length: int | None) -> bool:
    """Whether the model reads at most `max_length` tokens: all but a continuation's last."""
    longest = max(map(len, tree.continuations))
    return max_length is None or len(tree.context) + longest - 1 <= max_length


def trees(tokenizer: PretrainedTokenizer, texts: Iterable[Worded]) -> list[Tree]:
    """Contexts and continuations as tokens, cut as lm-evaluation-harness cuts them.

    Blanks at the end of a context go to its continuations. The two are encoded as one text, and
    the context alone: what is longer than the context is the continuation.

    What models ask one after the other in one process is encoded once, if their tokenizers agree.

    Raises:
      ValueError: for a continuation that adds no token, and a text that the tokenizer refuses.
    """
    return _trees(
        _By(tokenizer.to_json(), tokenizer.rows, tokenizer), tuple(map(_without_blanks, texts))
    )


@dataclasses.dataclass(frozen=True)
class _By:
    """A tokenizer, equal to one of the same JSON and for a head of as many rows."""

    json: str
    rows: int | None
    tokenizer: PretrainedTokenizer = dataclasses.field(compare=False)


@functools.lru_cache(REMEMBERED)
def _trees(by: _By, pairs: tuple[Worded, ...]) -> list[Tree]:
    flat = itertools.chain.from_iterable(
        (text.context, *(text.context + c for c in text.continuations)) for text in pairs
    )
    ids = itertools.chain.from_iterable(
        by.tokenizer.encode_texts(part) for part in itertools.batched(flat, TEXTS_AT_ONCE)
    )
    found = []
    for text in pairs:
        context = next(ids)
        continuations = [next(ids)[len(context) :] for _ in text.continuations]
        for continuation, tokens in zip(text.continuations, continuations, strict=True):
            if not tokens:
                raise ValueError(
                    f"{continuation!r} adds no token to {text.context[-60:]!r} in this tokenizer"
                )
        found.append(Tree(context, continuations))
    return found


def _without_blanks(text: Worded) -> Worded:
    context = text.context.rstrip()
    blanks = text.context[len(context) :]
    return Worded(context, tuple(blanks + c for c in text.continuations)) if blanks else text


def _examples(item: Item, examples: Mapping[str, Sequence[Item]], shots: int) -> Sequence[Item]:
    if not shots:
        return ()
    of_all = examples.get(item.subject, examples.get("", ()))
    others = [e for e in of_all if (e.question, e.choices) != (item.question, item.choices)]
    # Where it is one of just enough, as in MMLU's validation split, it has one fewer.
    if len(of_all) < shots:
        subject = f" of {item.subject}" if item.subject else ""
        raise ValueError(f"--shots {shots}: there are only {len(of_all)} solved examples{subject}")
    return others[:shots]
