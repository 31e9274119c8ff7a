import dataclasses
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.records import Message, Record, split, stable_hash


def dialogue(prompt: str, response: str = "yes", source: str = "") -> Record:
    return Record((Message("user", prompt), Message("assistant", response)), source)


def chat(*contents: str) -> Record:
    """The assistant opens."""
    roles = ("assistant", "user") * len(contents)
    return Record(tuple(map(Message, roles, contents)), "")


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


def test_the_response_is_what_the_assistant_says_after_the_user():
    record = chat("Hello! How can I help?", "What is 1 + 1?", "2", "Sure?", "Yes")
    assert record.response == "2"
    assert record.prompt == record.messages[:2]
    unlearned = dataclasses.replace(record.messages[2], learn=False)
    record = dataclasses.replace(
        record, messages=(*record.messages[:2], unlearned, *record.messages[3:])
    )
    assert record.response == "Yes"
    only = chat("Hello!")
    assert (only.response, only.prompt) == ("Hello!", ())


def test_chats_that_begin_with_the_same_greeting_are_told_apart():
    records = [chat("Hello! How can I help?", f"question {i}", f"answer {i}") for i in range(100)]
    train, held_out = split(records, 0.1)
    assert 3 < len(held_out) < 20
    assert len(train) + len(held_out) == 100


@pytest.mark.parametrize("role", ["text", "assistant"])
def test_what_nobody_asks_for_is_told_apart_by_what_is_said(role):
    records = [Record((Message(role, f"line {i}"),), "") for i in range(100)]
    assert 3 < len(split(records, 0.1)[1]) < 20


@pytest.mark.parametrize("common", [900, 300])
def test_a_prompt_of_many_records_is_not_held_out(common, caplog):
    records = [dialogue("Translate A", f"answer {i}") for i in range(common)]
    records += [dialogue(f"question {i}") for i in range(1000 - common)]
    train, held_out = split(records, 0.1)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    share = len(held_out) / 1000
    assert len(held_out) == pytest.approx(0.1 * (1000 - common), rel=0.5)
    warned = f"held out {len(held_out)} of 1000 records, {share:.1%} where 10.0% was asked for"
    assert (warned in caplog.text) == (abs(share - 0.1) > 0.03)
    assert ("in 900 record(s)" in caplog.text) == (common == 900)


def test_where_every_prompt_has_many_records_the_smallest_is_held_out(caplog):
    records = [dialogue("a")] * 60 + [dialogue("b")] * 40
    with caplog.at_level(logging.WARNING):
        assert split(records, 0.1) == (records[:60], records[60:])
    assert "held out 40 of 100 records, 40.0% where 10.0% was asked for" in caplog.text


def test_an_empty_response_can_be_told():
    assert [dialogue("a", answer).has_empty_response for answer in ("b", "", " \n", "  c")] == [
        False, True, True, False,
    ]  # fmt: skip
    half_empty = chat("", "a", "b")
    assert half_empty.has_empty_response
    unlearned = dataclasses.replace(half_empty.messages[0], learn=False)
    assert not dataclasses.replace(
        half_empty, messages=(unlearned, *half_empty.messages[1:])
    ).has_empty_response
