import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.encode import MIN_LENGTH, encode_records
from train.data.records import Message, Record
from train.text.bpe import train
from train.text.tokenizer import Example

BPE = train(["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 5, 300)


def conversation(*contents: str) -> Record:
    roles = ("user", "assistant") * len(contents)
    return Record(tuple(map(Message, roles, contents)), "test")


def layout(example: Example | None) -> str:
    """The example as text, with the part that has loss in [brackets]."""
    assert example is not None
    marks = np.diff(example.loss_mask.astype(int), prepend=0, append=0)
    parts = []
    for i, mark in enumerate(marks):
        parts.append({1: "[", -1: "]", 0: ""}[int(mark)])
        if i < len(example.tokens):
            parts.append(BPE.decode([int(example.tokens[i])], skip_special=False))
    return "".join(parts)


def encode(record: Record, max_length: int) -> Example | None:
    (examples,) = encode_records(BPE, [record], max_length)
    return examples[0] if examples else None


def test_loss_is_on_what_the_assistant_says_and_on_its_end():
    example = encode(conversation("cat?", "a cat"), 100)
    assert layout(example) == "<|bos|><|user|>cat?<|end|><|assistant|>[a cat<|end|>]"
    assert example.tokens.dtype == np.int32
    assert example.removed == 0


def test_every_assistant_turn_has_loss():
    record = conversation("cat?", "a cat", "dog?", "a dog")
    system = Message("system", "be the cat")
    record = dataclasses.replace(record, messages=(system, *record.messages))
    assert layout(encode(record, 100)) == (
        "<|bos|><|system|>be the cat<|end|>"
        "<|user|>cat?<|end|><|assistant|>[a cat<|end|>]"
        "<|user|>dog?<|end|><|assistant|>[a dog<|end|>]"
    )


def test_a_turn_that_is_not_to_be_learned_has_no_loss():
    record = conversation("cat?", "a dog", "no", "a cat")
    bad = dataclasses.replace(record.messages[1], learn=False)
    record = dataclasses.replace(record, messages=(record.messages[0], bad, *record.messages[2:]))
    assert layout(encode(record, 100)) == (
        "<|bos|><|user|>cat?<|end|><|assistant|>a dog<|end|>"
        "<|user|>no<|end|><|assistant|>[a cat<|end|>]"
    )


# In the tests of cutting, digits are one token each, for they were not in the training text.


def test_a_long_response_loses_its_end():
    example = encode(conversation("12", "0123456789"), 12)
    assert layout(example) == "<|bos|><|user|>12<|end|><|assistant|>[012345]"
    assert example.removed == 5


def test_a_long_prompt_makes_room_for_the_response():
    example = encode(conversation("0123456789", "12"), 12)
    assert layout(example) == "<|bos|><|user|>01234<|end|><|assistant|>[12<|end|>]"
    assert example.removed == 5


def test_of_two_prompt_messages_the_longer_makes_room():
    record = Record(
        (Message("system", "123"), Message("user", "0123456789"), Message("assistant", "7")), ""
    )
    assert layout(encode(record, 17)) == (
        "<|bos|><|system|>123<|end|><|user|>012345<|end|><|assistant|>[7<|end|>]"
    )


def test_a_prompt_makes_room_for_half_a_row_of_response_and_no_more():
    example = encode(conversation("0123456789", "7" * 50), 20)
    assert layout(example) == "<|bos|><|user|>012345<|end|><|assistant|>[7777777777]"


def test_a_prompt_keeps_half_of_itself_even_if_no_response_is_left():
    record = conversation("0123456789", "7")
    assert layout(encode(record, 10)) == "<|bos|><|user|>01234<|end|><|assistant|>[7]"
    assert encode(record, 9) is None


@given(st.lists(st.text("0123", max_size=30), min_size=2, max_size=5), st.integers(8, 60))
def test_cutting_keeps_what_it_can(contents, max_length):
    record = conversation(*contents)
    whole = encode(record, 10_000)
    example = encode(record, max_length)
    response = len(contents[1]) + 1
    if example is None:
        assert 4 + (len(contents[0]) + 1) // 2 >= max_length
        return
    assert example.loss_mask.shape == example.tokens.shape == (min(max_length, len(whole.tokens)),)
    assert example.loss_mask.any()
    assert example.removed == len(whole.tokens) - len(example.tokens)
    if example.removed:
        kept_of_prompt = int(np.argmax(example.loss_mask)) - 4
        assert (
            BPE.decode(example.tokens[2 : 2 + kept_of_prompt].tolist())
            == contents[0][:kept_of_prompt]
        )
        assert kept_of_prompt >= len(contents[0]) - len(contents[0]) // 2
        if kept_of_prompt > len(contents[0]) - len(contents[0]) // 2:
            assert np.count_nonzero(example.loss_mask) >= min(response, max_length // 2)
    else:
        np.testing.assert_array_equal(example.tokens, whole.tokens)


def test_many_records_are_encoded_as_each_alone():
    records = [conversation("cat?" * n, "dog " * n) for n in range(20)]
    together = encode_records(BPE, records, 20)
    assert {len(examples) for examples in together} == {0, 1}
    for record, examples in zip(records, together, strict=True):
        alone = encode_records(BPE, [record], 20)[0]
        assert len(alone) == len(examples)
        for one, other in zip(alone, examples, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.loss_mask, other.loss_mask)


def test_a_row_too_short_for_any_example_is_refused():
    with pytest.raises(ValueError, match=f"max_length must be at least {MIN_LENGTH} tokens, got 7"):
        encode(conversation("a", "b"), 7)


@given(st.text("0123", min_size=1, max_size=60), st.integers(8, 30))
def test_plain_text_goes_on_in_other_rows_and_every_token_is_predicted_once(text, max_length):
    record = Record((Message("text", text),), "test")
    (whole,) = BPE.encode([record])
    (examples,) = encode_records(BPE, [record], max_length)
    predicted = np.concatenate([example.tokens[example.loss_mask] for example in examples])
    assert predicted.tolist() == whole.tokens[1:].tolist()
    for example in examples:
        assert len(example.tokens) <= max_length
        assert not example.loss_mask[0]
    for before, after in itertools.pairwise(examples):
        assert len(before.tokens) == max_length
        assert before.tokens[-1] == after.tokens[0]
