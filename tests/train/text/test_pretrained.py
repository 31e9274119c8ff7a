"""A checkpoint's tokenizer: from a folder, from GGUF's metadata; which tokens are learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

from train.data.encode import encode_records
from train.data.records import Message, Record
from train.text import from_gguf
from train.text.chat import BUILT_IN
from train.text.pretrained import PretrainedTokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def library_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level, without merges: a token a byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    bos = found.token_to_id("<s>")
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return found


def folder(path, **config):
    library_tokenizer().save(str(path / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "</s>"} | config
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    return path


def learnt(tokenizer: PretrainedTokenizer, *messages: Message) -> tuple[str, list[str]]:
    """All the text, and each run of tokens with loss, as text."""
    example = tokenizer.encode([Record(messages, "it")])[0]
    parts, current = [], []
    for token, mask in zip([*example.tokens, 0], [*example.loss_mask, False], strict=True):
        if mask:
            current.append(int(token))
        elif current:
            parts.append(tokenizer.decode(current, skip_special=False))
            current = []
    return tokenizer.decode(example.tokens.tolist(), skip_special=False), parts


ASKED = (Message("user", "a?"), Message("assistant", "yes"))


def test_the_loss_is_on_answers_and_on_the_token_that_ends_them(tmp_path):
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path, chat_template=BUILT_IN["chatml"]))
    end = tokenizer._id("<|im_end|>")
    assert tokenizer.stops == {tokenizer._id("</s>"), end}
    text, parts = learnt(tokenizer, *ASKED, Message("user", "b?"), Message("assistant", "no"))
    assert parts == ["yes<|im_end|>", "no<|im_end|>"]
    assert text.startswith("<|im_start|>user\na?<|im_end|>\n")  # the template writes no <s>
    turn = Message("assistant", "yes", learn=False)
    _, parts = learnt(tokenizer, ASKED[0], turn, Message("user", "b?"), Message("assistant", "no"))
    assert parts == ["no<|im_end|>"]


def test_the_end_of_turn_is_learnt_though_padding_has_its_id(tmp_path):
    values = {"chat_template": BUILT_IN["chatml"], "pad_token": "<|im_end|>"}
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path, **values))
    assert tokenizer.pad in tokenizer.stops
    assert learnt(tokenizer, *ASKED)[1] == ["yes<|im_end|>"]


EARLIER = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
"""The last answer has an empty thought, and earlier ones have none."""


def test_the_loss_is_on_earlier_answers_that_are_written_otherwise(tmp_path, caplog):
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path, chat_template=EARLIER))
    talk = (*ASKED, Message("user", "b?"), Message("assistant", "yes"), *ASKED)
    _, parts = learnt(tokenizer, *talk)
    thought = "<think>\n\n</think>\n\n"
    assert parts == ["yes<|im_end|>", "yes<|im_end|>", f"{thought}yes<|im_end|>"]
    not_learnt = (ASKED[0], Message("assistant", "yes", learn=False), *talk[2:])
    _, parts = learnt(tokenizer, *not_learnt)
    assert parts == ["yes<|im_end|>", f"{thought}yes<|im_end|>"]
    assert tokenizer.encode([Record(talk, "it")])[0].untold == 0
    encode_records(tokenizer, [Record(talk, "it")], 200)
    assert not caplog.messages


def test_turns_without_loss_are_counted_and_the_first_is_named(tmp_path, caplog):
    prompt = "<|im_start|>assistant{{ '\n' }}"
    assert prompt in EARLIER
    prompts = EARLIER.replace(prompt, "<|im_start|>assistant{{ '\n<think>\n' }}")
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path, chat_template=prompts))
    _, parts = learnt(tokenizer, *ASKED, *ASKED)
    assert parts == ["\n</think>\n\nyes<|im_end|>"]
    unlearnt = (ASKED[0], Message("assistant", "yes", learn=False), *ASKED)
    records = [
        Record(ASKED, "data.jsonl:1"),
        Record(unlearnt, "data.jsonl:2"),
        Record(ASKED * 3, "data.jsonl:3"),
        Record(ASKED * 2, "data.jsonl:4"),
    ]
    assert all(encode_records(tokenizer, records, 200))
    (said,) = caplog.messages
    assert said.startswith(
        "3 turn(s) of the assistant have no loss, of which the first is in data.jsonl:3: "
    )


def test_a_prompt_is_how_the_example_begins(tmp_path):
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path))
    example = tokenizer.encode([Record(ASKED, "it")])[0]
    prompt = tokenizer.encode_prompt(ASKED[:1])
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.loss_mask[: len(prompt)].any()
    assert example.loss_mask[len(prompt)]
    start, end = example.shortenable
    assert tokenizer.decode(example.tokens[start:end].tolist()) == "a?"


def test_plain_text_is_between_its_beginning_and_its_end(tmp_path):
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path))
    example = tokenizer.encode([Record((Message("text", "abc"),), "it")])[0]
    assert tokenizer.decode(example.tokens.tolist(), skip_special=False) == "<s>abc</s>"
    assert example.loss_mask.all()
    assert tokenizer.encode_text("abc", start=False) == example.tokens[1:-1].tolist()


def test_the_template_is_its_own_or_the_one_of_its_family_or_named(tmp_path):
    own = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    assert PretrainedTokenizer.from_folder(folder(tmp_path)).template.source == BUILT_IN["chatml"]
    listed = [{"name": "tool", "template": "x"}, {"name": "default", "template": own}]
    for value in (own, listed):
        found = PretrainedTokenizer.from_folder(folder(tmp_path, chat_template=value))
        assert found.template.source == own
    (tmp_path / "chat_template.jinja").write_text(BUILT_IN["plain"])
    assert PretrainedTokenizer.from_folder(tmp_path).template.source == BUILT_IN["plain"]
    alpaca = PretrainedTokenizer.from_folder(tmp_path, "alpaca")
    text, parts = learnt(alpaca, *ASKED)
    assert text.startswith("<s>Below is an instruction")
    assert parts == ["yes</s>"]
    with pytest.raises(ValueError, match="--template gemma needs <start_of_turn>"):
        PretrainedTokenizer.from_folder(tmp_path, "gemma")
    with pytest.raises(ValueError, match="--template must be auto or one of chatml"):
        PretrainedTokenizer.from_folder(tmp_path, "odd")


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in"):
        PretrainedTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not read"):
        PretrainedTokenizer.from_folder(tmp_path)
    folder(tmp_path, chat_template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match="leaves out what is answered"):
        PretrainedTokenizer.from_folder(tmp_path)
    folder(tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="ends an answer without a token to stop at"):
        PretrainedTokenizer.from_folder(tmp_path)
    refusing = "{{ raise_exception('no') if messages|length > 2 }}" + BUILT_IN["chatml"]
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path, chat_template=refusing))
    with pytest.raises(
        ValueError, match=r"data\.jsonl:7: the chat template of .* refuses this: no"
    ):
        tokenizer.encode([Record((*ASKED, *ASKED), "data.jsonl:7")])
    endless = "{% if messages|length > 2 %}{{ 'x' * 9999999 }}{% endif %}" + BUILT_IN["chatml"]
    tokenizer = PretrainedTokenizer.from_folder(folder(tmp_path, chat_template=endless))
    with pytest.raises(
        ValueError, match=r"^data\.jsonl:7: the chat template of .* it repeats some"
    ):
        tokenizer.encode([Record((*ASKED, *ASKED), "data.jsonl:7")])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        PretrainedTokenizer.from_folder(tmp_path)
    library_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold an object, not list"):
        PretrainedTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": 5}, r"tokenizer_config\.json: chat_template must be text, not 5"),
        ({"chat_template": [{"a": 1}]}, r"tokenizer_config\.json is damaged: KeyError\('name'\)"),
        ({"eos_token": 5}, r"tokenizer_config\.json is damaged: TypeError"),
        ({"bos_token": {"content": 5}}, r"tokenizer_config\.json: bos_token must be text, not 5"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_file(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer.from_folder(folder(tmp_path, **config))


def test_a_template_that_is_no_utf_8_is_named_with_its_file(tmp_path):
    (folder(tmp_path) / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8: "):
        PretrainedTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_an_id_that_the_tokenizer_has_not_is_named_with_its_file(tmp_path, file, key):
    folder(tmp_path, chat_template=BUILT_IN["chatml"])
    for value in ("x", ["x"], 260, -1, 2**70, [257, 99999], [[1]], 1.5, True):
        wrong = value[-1] if isinstance(value, list) else value
        (tmp_path / file).write_text(json.dumps({key: value}))
        with pytest.raises(ValueError, match=rf"{file}: {key} must be one id .*") as raised:
            PretrainedTokenizer.from_folder(tmp_path)
        assert f"whose last is 259, not {wrong!r}: " in str(raised.value)
    for value in (None, 257, [257, 259], []):
        values = {key: value, "pad_token_id": -1}  # as the first Llamas said that they have none
        (tmp_path / file).write_text(json.dumps(values))
        stops = PretrainedTokenizer.from_folder(tmp_path).stops
        assert stops == {257, 259}


def gguf_metadata(**changes):
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            "<unk>",
            "<s>",
            "</s>",
            "▁",
            "a",
            "b",
            "ab",
            "▁a",
            "  ",
            "<turn>",
        ],
        "tokenizer.ggml.scores": [0, 0, 0, -4, -5, -6, -2, -1, -3, 0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 4, 3],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return lambda key, default=None: metadata.get(key, default)


def test_sentencepiece_in_gguf_merges_the_best_score_first_and_begins_with_a_space():
    found = from_gguf.tokenizer(gguf_metadata(), "it")
    assert found.encode("ab").tokens == ["<s>", "▁a", "b"]
    assert found.encode("b<turn>", add_special_tokens=False).tokens[-1] == "<turn>"
    assert found.decode(found.encode("ab a").ids) == "ab a"
    bare = from_gguf.tokenizer(gguf_metadata(add_space_prefix=False, add_bos_token=False), "it")
    assert bare.encode("ab").tokens == ["ab"]


def test_a_tokenizer_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="it holds no tokenizer"):
        from_gguf.tokenizer(gguf_metadata(tokens=None), "it")
    with pytest.raises(ValueError, match="tokenizer 't5' is not known"):
        from_gguf.tokenizer(gguf_metadata(model="t5"), "it")
    with pytest.raises(ValueError, match="how its tokenizer 'odd' splits text is not known"):
        from_gguf.tokenizer(gguf_metadata(model="gpt2", pre="odd", merges=[]), "it")


@pytest.mark.parametrize(
    "damage",
    [
        {"model": "gpt2", "merges": ["a b"], "tokens": ["a", "b", "c"]},
        {"model": "gpt2", "merges": ["ab"], "tokens": ["a", "b", "ab"]},
        {"merges": ["a c"]},
        {"scores": None},
        {"tokens": ["a", 5, "b"]},
    ],
)
def test_a_damaged_tokenizer_in_gguf_is_one_line(damage):
    with pytest.raises(ValueError, match=r"^it: its tokenizer is damaged: [^\n]+$"):
        PretrainedTokenizer.from_gguf(gguf_metadata(**damage), Path("it"))


def test_a_template_in_gguf_that_is_no_text_is_named():
    def get(key, default=None):
        return 5 if key == "tokenizer.chat_template" else gguf_metadata()(key, default)

    with pytest.raises(ValueError, match=r"^it: tokenizer\.chat_template must be text, not 5$"):
        PretrainedTokenizer.from_gguf(get, Path("it"))


def test_a_padding_id_in_gguf_of_no_token_is_none():
    for value in (10, 2**32 - 1, 2**40, -1, "x", 2.0, None):
        metadata = gguf_metadata(padding_token_id=value)
        assert PretrainedTokenizer.from_gguf(metadata, Path("it")).pad == 0


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_an_id_in_gguf_of_no_token_is_named(name):
    for value in (10, 2**40, -1, "x", 1.0, True, [1]):
        metadata = gguf_metadata(**{f"{name}_token_id": value})
        with pytest.raises(ValueError, match=r"^it: tokenizer") as raised:
            PretrainedTokenizer.from_gguf(metadata, Path("it"))
        assert f"{name}_token_id must be one of its 10 tokens, not {value!r}" in str(raised.value)
