import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED_DATA

from train.data.records import Message, Record, read_jsonl, split, stable_hash

SHARED = SHARED_DATA


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def dialogue(prompt: str, response: str = "yes", source: str = "") -> Record:
    return Record((Message("user", prompt), Message("assistant", response)), source)


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 1 more?"},
        {"role": "assistant", "content": "3"},
    ]
}


def test_three_formats_become_conversations(tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        {"instruction": "Add.", "input": "1, 2", "output": "3", "subsets": ["extra"]},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "output": "ho"},
        {"prompt": "2 + 2 =", "completion": " 4"},
        CHAT,
        {"messages": None, "prompt": "whole?", "completion": "no"},
        {"instruction": "Add.", "output": "3", "prompt": "another field"},
    )
    records = read_jsonl(path)
    user, assistant = "user", "assistant"
    assert [[(m.role, m.content) for m in r.messages] for r in records] == [
        [(user, "Add.\n\n1, 2"), (assistant, "3")],
        [(user, "Say hi."), (assistant, "hi")],
        [(user, "Say ho."), (assistant, "ho")],
        [(user, "2 + 2 ="), (assistant, " 4")],
        [(m["role"], m["content"]) for m in CHAT["messages"]],
        [(user, "whole?"), (assistant, "no")],
        [(user, "Add."), (assistant, "3")],
    ]
    assert [r.source for r in records] == [f"{path}:{n}" for n in range(1, 8)]
    assert [m.content for m in records[4].prompt] == ["Be brief.", "1 + 1?"]
    assert records[4].response == "2"


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    line = json.dumps({"prompt": "é\u2028", "completion": "ü"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    records = read_jsonl(path)
    assert [r.source for r in records] == [f"{path}:1", f"{path}:4"]
    assert [r.messages[0].content for r in records] == ["é\u2028"] * 2


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ('{"prompt": "a", ', "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ('{"prompt": ' + "7" * 5000 + "}", "invalid JSON"),
        ('["prompt"]', "expected a JSON object, got an array"),
        ("3", "expected a JSON object, got a number"),
        ({"question": "a", "answer": "b"}, "the fields are ['answer', 'question']"),
        ({"prompt": "a"}, "missing field 'completion'"),
        ({"instruction": "a", "input": "b"}, "missing field 'output'"),
        (
            {"instruction": "a", "input": ["b"], "output": "c"},
            "'input' must be a string, got an array",
        ),
        ({"prompt": "a", "completion": None}, "'completion' must be a string, got null"),
        ({"prompt": 1.5, "completion": "b"}, "'prompt' must be a string, got a number"),
        ({"prompt": True, "completion": "b"}, "'prompt' must be a string, got a boolean"),
        ('{"prompt": "a", "completion": "\\ud800"}', "'completion' holds half of a surrogate pair"),
        ({"messages": {"role": "user"}}, "'messages' must be an array, got an object"),
        ({"messages": ["hi"]}, "'messages[0]' must be an object, got a string"),
        ({"messages": []}, "no message has the role 'assistant'"),
        ({"messages": CHAT["messages"][:2]}, "no message has the role 'assistant'"),
        ({"messages": [{"content": "a"}]}, "missing field 'messages[0].role'"),
        ({"messages": [{"role": "user"}]}, "missing field 'messages[0].content'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unknown role 'tool' in 'messages[0]'"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, bad, what):
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b"}, "", bad)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is asserted below)
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert what in str(error.value)


def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"prompt": "\xff", "completion": "b"}')
    with pytest.raises(ValueError, match=r"data\.jsonl:2: not UTF-8"):
        read_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_records_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no records"):
        read_jsonl(path)


def test_an_empty_response_can_be_told(tmp_path):
    lines = [{"prompt": "a", "completion": c} for c in ("b", "", " \n", "  c")]
    half_empty = {"messages": [*CHAT["messages"], {"role": "assistant", "content": ""}]}
    records = read_jsonl(write(tmp_path / "data.jsonl", *lines, CHAT, half_empty))
    assert [r.has_empty_response for r in records] == [False, True, True, False, False, True]


def test_split_depends_on_the_prompt_alone():
    records = [dialogue(f"question {i}", f"answer {i}") for i in range(1000)]
    train, held_out = split(records, 0.1)
    assert 70 < len(held_out) < 130
    assert [r for r in records if r in set(train)] == train  # order is kept
    assert set(train) | set(held_out) == set(records)

    others = [dialogue(f"question {i}", "another answer", "elsewhere") for i in range(0, 2000, 2)]
    other_train, other_held_out = split(others[::-1], 0.1)
    prompts = {r.prompt for r in train}
    assert not prompts & {r.prompt for r in other_held_out}
    assert not {r.prompt for r in held_out} & {r.prompt for r in other_train}


def test_split_is_the_same_in_every_version_of_this_project():
    _, held_out = split([dialogue(f"question {i}") for i in range(40)], 0.1)
    held_out_numbers = [int(r.prompt[0].content.split()[1]) for r in held_out]
    assert held_out_numbers == [12, 16, 23, 26, 37]


@given(st.lists(st.text(max_size=3), min_size=2, max_size=20), st.floats(0.001, 0.999))
def test_neither_side_of_a_split_is_empty(prompts, share):
    records = [dialogue(prompt) for prompt in prompts]
    if len(set(prompts)) < 2:
        with pytest.raises(ValueError, match="fewer than two different prompts"):
            split(records, share)
        return
    train, held_out = split(records, share)
    assert train
    assert held_out
    assert len(train) + len(held_out) == len(records)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}


def test_a_bigger_held_out_share_only_adds():
    records = [dialogue(f"question {i}") for i in range(300)]
    shares = [split(records, share)[1] for share in (0.05, 0.2, 0.7)]
    assert set(shares[0]) < set(shares[1]) < set(shares[2])


def test_split_of_nothing_held_out():
    records = [dialogue("a"), dialogue("a")]
    assert split(records, 0) == (records, [])


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_split_refuses_a_share_outside_its_range(share):
    with pytest.raises(ValueError, match=r"held_out must be in \[0, 1\), got"):
        split([dialogue("a"), dialogue("b")], share)


def test_stable_hash_knows_where_its_parts_end():
    assert stable_hash("ab", "c") != stable_hash("a", "bc") != stable_hash("abc")


@pytest.mark.skipif(not SHARED.exists(), reason="no folder of data sets beside the repository")
@pytest.mark.parametrize(
    ("name", "count", "empty"),
    [
        ("alpaca/alpaca_20k-00000.jsonl", 8971, [1462, 3588, 6235]),
        ("dolly/dolly_3k.jsonl", 2996, []),
    ],
)
def test_published_data_sets(name, count, empty):
    records = read_jsonl(SHARED / name)
    assert len(records) == count
    sources = [r.source for r in records if r.has_empty_response]
    assert sources == [f"{SHARED / name}:{line}" for line in empty]
