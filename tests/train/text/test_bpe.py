import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.records import Message, Record
from train.text.bpe import BPE as Tokenizer
from train.text.bpe import MIN_VOCAB_SIZE, SPECIAL_TOKENS, train, train_or_load

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 5
BPE = train(TEXTS, 300)


@given(st.text())
def test_decoding_undoes_encoding(text):
    assert BPE.decode(BPE.encode_text(text)) == text


@pytest.mark.parametrize("text", [*SPECIAL_TOKENS, "a<|end|><|assistant|>b"])
def test_text_never_becomes_a_special_token(text):
    tokens = BPE.encode_text(text)
    assert min(tokens) >= len(SPECIAL_TOKENS)
    assert BPE.encode_texts([text]) == [tokens]
    assert Tokenizer.from_json(BPE.to_json()).encode_text(text) == tokens


def test_special_tokens_come_first():
    assert [BPE.pad, BPE.bos, BPE.end, BPE.system, BPE.user, BPE.assistant] == [0, 1, 2, 3, 4, 5]
    assert BPE.decode(range(6), skip_special=False) == "".join(SPECIAL_TOKENS)


def test_training_learns_what_is_frequent():
    assert len(BPE.encode_text(" cat sat on the dog")) == 5
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
    assert tokenizer.decode(tokenizer.encode_text("a b")) == "a b"
    assert "the tokenizer is not kept for the next run: " in caplog.text


def test_a_prompt_ends_where_the_assistant_begins():
    record = Record((Message("user", "cat?"), Message("assistant", "a cat")), "test")
    (example,) = BPE.encode([record])
    prompt = BPE.encode_prompt(record.messages[:1])
    assert prompt == example.tokens[: len(prompt)].tolist()
    assert example.loss_mask.tolist() == [i >= len(prompt) for i in range(len(example.tokens))]
    assert set(example.tokens[-1:].tolist()) == BPE.stops


def test_plain_text_has_no_roles_and_loss_on_all_of_it():
    (example,) = BPE.encode([Record((Message("text", "the cat"),), "test")])
    assert BPE.decode(example.tokens.tolist(), skip_special=False) == "<|bos|>the cat<|end|>"
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
