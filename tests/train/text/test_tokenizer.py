import dataclasses
import multiprocessing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.records import Message, Record
from train.text.tokenizer import (
    MIN_LENGTH,
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    Example,
    Tokenizer,
    encode_record,
    encode_records,
    train,
    train_or_load,
)

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 5
BPE = train(TEXTS, 300)


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


@given(st.text())
def test_decoding_undoes_encoding(text):
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize("text", [*SPECIAL_TOKENS, "a<|end|><|assistant|>b"])
def test_text_never_becomes_a_special_token(text):
    tokens = BPE.encode(text)
    assert min(tokens) >= len(SPECIAL_TOKENS)
    assert BPE.encode_batch([text]) == [tokens]
    assert Tokenizer.from_json(BPE.to_json()).encode(text) == tokens


def test_special_tokens_come_first():
    assert [BPE.pad, BPE.bos, BPE.end, BPE.system, BPE.user, BPE.assistant] == [0, 1, 2, 3, 4, 5]
    assert BPE.decode(range(6), skip_special=False) == "".join(SPECIAL_TOKENS)


def test_training_learns_what_is_frequent():
    assert len(BPE.encode(" cat sat on the dog")) == 5
    assert MIN_VOCAB_SIZE < BPE.vocab_size <= 300
    assert train(TEXTS, 270).vocab_size == 270
    assert train(["x"], 8192).vocab_size == MIN_VOCAB_SIZE


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 262, got 261"):
        train(TEXTS, 261)


def test_someone_elses_tokenizer_is_refused():
    with pytest.raises(ValueError, match="is not id"):
        Tokenizer.from_json(BPE.to_json().replace("<|bos|>", "<|boss|>"))


def _train_here(_: int) -> str:
    return train(TEXTS, 300).to_json()


def test_training_gives_the_same_in_every_process():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_train_here, range(2)) == [BPE.to_json()] * 2


def test_cache_is_keyed_by_content(tmp_path):
    first = train_or_load(TEXTS, tmp_path / "new", 300)
    assert first.to_json() == BPE.to_json()
    (file,) = (tmp_path / "new").iterdir()
    stamp = file.stat().st_mtime_ns
    assert train_or_load(TEXTS, tmp_path / "new", 300).to_json() == BPE.to_json()
    assert file.stat().st_mtime_ns == stamp  # loaded, not trained
    for texts, size in ((TEXTS[1:], 300), (TEXTS, 299), (["".join(TEXTS)], 300)):
        train_or_load(texts, tmp_path / "new", size)
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_a_damaged_cache_file_is_replaced(tmp_path):
    train_or_load(TEXTS, tmp_path, 300)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert train_or_load(TEXTS, tmp_path, 300).to_json() == BPE.to_json()
    assert file.read_text(encoding="utf-8") == BPE.to_json()


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path, caplog):
    (tmp_path / "file").touch()
    tokenizer = train_or_load(["a b c"], tmp_path / "file" / "cache", 300)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert "the tokenizer is not kept for the next run: " in caplog.text


def test_loss_is_on_what_the_assistant_says_and_on_its_end():
    example = encode_record(BPE, conversation("cat?", "a cat"), 100)
    assert layout(example) == "<|bos|><|user|>cat?<|end|><|assistant|>[a cat<|end|>]"
    assert example.tokens.dtype == np.int32
    assert example.removed == 0


def test_every_assistant_turn_has_loss():
    record = conversation("cat?", "a cat", "dog?", "a dog")
    system = Message("system", "be the cat")
    record = dataclasses.replace(record, messages=(system, *record.messages))
    assert layout(encode_record(BPE, record, 100)) == (
        "<|bos|><|system|>be the cat<|end|>"
        "<|user|>cat?<|end|><|assistant|>[a cat<|end|>]"
        "<|user|>dog?<|end|><|assistant|>[a dog<|end|>]"
    )


# In the tests of cutting, digits are one token each, for they were not in the training text.


def test_a_long_response_loses_its_end():
    example = encode_record(BPE, conversation("12", "0123456789"), 12)
    assert layout(example) == "<|bos|><|user|>12<|end|><|assistant|>[012345]"
    assert example.removed == 5


def test_a_long_prompt_makes_room_for_the_response():
    example = encode_record(BPE, conversation("0123456789", "12"), 12)
    assert layout(example) == "<|bos|><|user|>01234<|end|><|assistant|>[12<|end|>]"
    assert example.removed == 5


def test_of_two_prompt_messages_the_longer_makes_room():
    record = Record(
        (Message("system", "123"), Message("user", "0123456789"), Message("assistant", "7")), ""
    )
    assert layout(encode_record(BPE, record, 17)) == (
        "<|bos|><|system|>123<|end|><|user|>012345<|end|><|assistant|>[7<|end|>]"
    )


def test_a_prompt_makes_room_for_half_a_row_of_response_and_no_more():
    example = encode_record(BPE, conversation("0123456789", "7" * 50), 20)
    assert layout(example) == "<|bos|><|user|>012345<|end|><|assistant|>[7777777777]"


def test_a_prompt_keeps_half_of_itself_even_if_no_response_is_left():
    record = conversation("0123456789", "7")
    assert layout(encode_record(BPE, record, 10)) == "<|bos|><|user|>01234<|end|><|assistant|>[7]"
    assert encode_record(BPE, record, 9) is None


@given(st.lists(st.text("0123", max_size=30), min_size=2, max_size=5), st.integers(8, 60))
def test_cutting_keeps_what_it_can(contents, max_length):
    record = conversation(*contents)
    whole = encode_record(BPE, record, 10_000)
    example = encode_record(BPE, record, max_length)
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
    assert {type(example) for example in together} == {Example, type(None)}
    for record, example in zip(records, together, strict=True):
        alone = encode_record(BPE, record, 20)
        assert (alone is None) == (example is None)
        if alone is not None and example is not None:
            np.testing.assert_array_equal(alone.tokens, example.tokens)
            np.testing.assert_array_equal(alone.loss_mask, example.loss_mask)


def test_a_row_too_short_for_any_example_is_refused():
    with pytest.raises(ValueError, match=f"max_length must be at least {MIN_LENGTH} tokens, got 7"):
        encode_record(BPE, conversation("a", "b"), 7)
