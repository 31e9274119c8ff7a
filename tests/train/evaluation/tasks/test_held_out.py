import collections

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from train.data.packing import pack
from train.data.records import Message, Record
from train.evaluation.scoring import fitting_questions
from train.evaluation.tasks.held_out import MAX_OPTION_CHARACTERS, OPTIONS, Exam, questions
from train.text.bpe import train
from train.text.chat import BUILT_IN
from train.text.pretrained import PretrainedTokenizer
from train.text.tokenizer import Tokenizer


def record(prompt: str, response: str, kind: str = "") -> Record:
    return Record(
        (Message("user", prompt), Message("assistant", response)), f"source of {prompt}", kind
    )


RECORDS = [record(f"{kind} {i}?", f"It is {kind} {i}.", kind) for kind in "ab" for i in range(40)]


def test_one_option_is_right_and_the_others_are_other_answers_of_its_kind():
    made = questions(RECORDS)
    assert [q.source for q in made] == [r.source for r in RECORDS]
    for question, of in zip(made, RECORDS, strict=True):
        assert question.prompt == of.prompt
        assert question.options[question.answer] == of.response
        assert len(set(question.options)) == OPTIONS == 4
        assert set(question.options) <= {r.response for r in RECORDS if r.kind == of.kind}


def test_the_right_option_is_anywhere():
    counts = collections.Counter(q.answer for q in questions(RECORDS))
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > len(RECORDS) / 10


def test_every_answer_is_wrong_for_someone():
    wrong = {o for q in questions(RECORDS) for i, o in enumerate(q.options) if i != q.answer}
    assert len(wrong) > 0.9 * len(RECORDS)


def test_the_seed_decides_and_the_order_of_records_does_not():
    made = questions(RECORDS, seed=1)
    assert questions(RECORDS, seed=1) == made
    assert questions(RECORDS[::-1], seed=1) == made[::-1]
    other = questions(RECORDS, seed=2)
    assert [q.answer for q in other] != [q.answer for q in made]
    assert [set(q.options) for q in other] != [set(q.options) for q in made]


@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from("ABCDE "), st.booleans())))
def test_no_two_options_are_equal_and_no_wrong_one_answers_the_prompt(drawn):
    records = [record(p, answer.lower() if low else answer) for p, answer, low in drawn]
    right = collections.defaultdict(set)
    for r in records:
        right[r.prompt].add(r.response.casefold())
    answers = {r.response.casefold() for r in records if r.response.strip()}
    made = iter(questions(records))
    for r in records:
        possible = answers - right[r.prompt]
        if not r.response.strip() or len(possible) < 3:
            continue
        question = next(made)
        folded = [option.casefold() for option in question.options]
        assert question.options[question.answer] == r.response
        assert len(set(folded)) == 4
        assert {o for i, o in enumerate(folded) if i != question.answer} <= possible
    assert next(made, None) is None


def test_an_option_is_the_first_paragraph_cut_at_a_word():
    words = "word " * 100
    texts = ["one\n\nmore", "\n two \n\nmore", "three\nlines\n\n\n\nmore", words, "Three  LINES"]
    made = questions([record(str(i), text) for i, text in enumerate(texts)])
    right = [q.options[q.answer] for q in made]
    assert right[:3] == ["one", "\n two", "three\nlines"]
    assert right[3] == words[: len(right[3])].rstrip()
    assert MAX_OPTION_CHARACTERS - 5 <= len(right[3]) <= MAX_OPTION_CHARACTERS
    for question in made:
        assert not {"three\nlines", "Three  LINES"} <= set(question.options)


def own_tokenizer(records: list[Record]) -> Tokenizer:
    return train([m.content for r in records for m in r.messages], 300)


def chatml(_: list[Record]) -> Tokenizer:
    """A checkpoint's, of bytes, whose end of turn is its padding too, as SmolLM2's is."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    vocab = {byte: i for i, byte in enumerate(sorted(byte_level.alphabet()))}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    template = BUILT_IN["chatml"]
    return PretrainedTokenizer(bpe, special, stops=[], template=template, where="the test")


@pytest.mark.parametrize("make", [own_tokenizer, chatml])
@pytest.mark.parametrize("blank", ["", " ", "\n", "\n\n", "\t "])
def test_what_is_scored_is_what_was_trained(blank, make):
    colors = ("red", "blue", "green", "brown")
    records = [record(f"the {color} one?", blank + color) for color in colors]
    tokenizer = make(records)
    exam = Exam(tokenizer, pack([], 128), questions(records))
    for (question, examples), trained in zip(
        fitting_questions(exam, 128), tokenizer.encode(records), strict=True
    ):
        scored = examples[question.answer]
        np.testing.assert_array_equal(scored.tokens, trained.tokens)
        (end,) = np.flatnonzero(trained.loss_mask & ~scored.loss_mask)
        assert end == np.flatnonzero(trained.loss_mask)[-1]
        assert trained.tokens[end] in tokenizer.stops
        said = tokenizer.decode(scored.tokens[scored.loss_mask].tolist(), skip_special=False)
        assert said == question.options[question.answer]


@pytest.mark.parametrize(
    "text",
    [
        "第248條 " + "一二三四五六七八九十" * 40,
        "https://example.org/" + "a/" * 400,
        "\n".join(f"line{i}=call({i})" for i in range(60)),
    ],
)
def test_text_without_spaces_is_cut_too(text):
    made = questions([record(str(i), text[:8] + str(i) + text[8:]) for i in range(4)])
    assert len(made) == 4
    for question in made:
        assert min(map(len, question.options)) >= MAX_OPTION_CHARACTERS * 4 // 5
        assert max(map(len, question.options)) <= MAX_OPTION_CHARACTERS


def test_what_nobody_asks_for_makes_no_question():
    texts = [Record((Message("text", f"text {i}"),), "") for i in range(9)]
    assert questions(texts) == []
    assert len(questions([*texts, *RECORDS])) == len(RECORDS)


def test_the_answer_to_the_user_is_asked_for_and_not_the_greeting():
    greeting = Message("assistant", "How can I help?")
    records = [
        Record((greeting, Message("user", f"{i}?"), Message("assistant", f"It is {i}")), "")
        for i in range(4)
    ]
    for question, of in zip(questions(records), records, strict=True):
        assert [m.content for m in question.prompt] == [m.content for m in of.messages[:2]]
        assert question.options[question.answer] == of.messages[2].content
    tokenizer = train([m.content for r in records for m in r.messages], 300)
    for question, examples in fitting_questions(
        Exam(tokenizer, pack([], 64), questions(records)), 64
    ):
        for option, example in zip(question.options, examples, strict=True):
            assert tokenizer.decode(example.tokens[example.loss_mask].tolist()) == option


def test_the_first_answer_of_a_longer_conversation_is_asked_for():
    user, assistant = "user", "assistant"
    long = Record(
        tuple(
            Message(r, c) for r, c in [(user, "a"), (assistant, "1"), (user, "b"), (assistant, "2")]
        ),
        "",
    )
    (question, *_) = questions([long, *(record(str(i), f"answer {i}") for i in range(3))])
    assert question.prompt == long.messages[:1]
    assert question.options[question.answer] == "1"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_answers_make_no_question(count):
    assert questions(RECORDS[:count]) == []
    assert len(questions(RECORDS[: count + 4])) == count + 4
