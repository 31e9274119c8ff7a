import collections
import hashlib
import os
import subprocess
import sys

import pytest
from paths import ROOT

from train.data import corpus
from train.data.records import split


@pytest.fixture(scope="module")
def records():
    return corpus.standard_library_records()


def test_there_are_thousands_of_every_kind(records):
    counts = collections.Counter(record.kind for record in records)
    assert len(records) > 4000
    assert set(counts) == set(corpus.QUESTIONS)
    assert min(counts.values()) > 100
    by_name = {record.source: record for record in records}
    assert {"textwrap.wrap", "os.path.join", "json", "str.split", "pathlib.Path.mkdir"} <= set(
        by_name
    )
    assert {"xml.etree.ElementTree", "KeyError", "asyncio.run"} <= set(by_name)
    wrap = by_name["textwrap.wrap"]
    assert wrap.response.startswith(
        "Wrap a single paragraph of text, returning a list of wrapped lines."
    )
    assert "wrap" in wrap.prompt[0].content


def test_questions_and_answers_are_well_formed(records):
    assert len({record.source for record in records}) == len(records)
    assert len({record.response for record in records}) == len(records)
    for record in records:
        question, answer = record.messages
        assert (question.role, answer.role) == ("user", "assistant")
        assert record.source.rpartition(".")[2] in question.content
        assert not {"{", "}"} & set(question.content)
        assert 10 < len(answer.content) <= corpus.MAX_ANSWER_CHARACTERS
        assert len(answer.content.split()) >= 4
        assert answer.content == answer.content.strip()
        assert "object at 0x" not in answer.content


def test_every_way_to_ask_is_used(records):
    for kind, templates in corpus.QUESTIONS.items():
        first_words = {t.partition("{")[0] for t in templates}
        asked = [r.prompt[0].content for r in records if r.kind == kind]
        for words in first_words:
            assert any(question.startswith(words) for question in asked), (kind, words)


def test_modules_that_do_things_when_imported_are_left_alone(records):
    modules = {record.source.partition(".")[0] for record in records}
    assert not modules & {"antigravity", "this", "idlelib", "tkinter", "turtle", "test", "lib2to3"}
    assert not {name for name in modules if name.startswith("_")}


def test_no_held_out_answer_is_in_the_training_part(records):
    train, held_out = split(records, 0.1)
    assert 300 < len(held_out) < 700
    assert not {r.response for r in train} & {r.response for r in held_out}


def test_records_are_the_same_in_every_process(records, tmp_path):
    code = """
import hashlib
from train.data import corpus
print(hashlib.sha256(repr(corpus.standard_library_records()).encode()).hexdigest())
"""
    result = subprocess.run(
        [sys.executable, "-OO", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "HOME": str(tmp_path), "COLUMNS": "40"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == hashlib.sha256(repr(records).encode()).hexdigest()


def test_what_was_put_in_place_of_a_standard_function_is_not_described(records, monkeypatch):
    monkeypatch.setattr("textwrap.wrap", test_questions_and_answers_are_well_formed)
    assert corpus.standard_library_records() == records


def test_a_python_without_docstrings_is_told_apart(monkeypatch):
    items = [item | {"doc": ""} for item in corpus._documented_items()]
    monkeypatch.setattr(corpus, "_documented_items", lambda: items)
    with pytest.raises(ValueError, match=r"found 0 docstrings .* give data of your own"):
        corpus.standard_library_records()


def test_a_python_that_does_not_start_says_so(monkeypatch):
    monkeypatch.setattr(corpus, "__file__", "/nowhere/corpus.py")
    with pytest.raises(ValueError, match=r"(?s)/nowhere/docstrings\.py failed:\n.*No such file"):
        corpus.standard_library_records()


def item(name: str, doc: str) -> dict[str, str]:
    return {"kind": "function", "name": name, "owner": "m", "module": "m", "doc": doc}


def test_answers_are_whole_paragraphs_and_used_once(monkeypatch):
    paragraph = "some words about the function\n" * 20
    kept = [(f"m.f{i}", f"What f{i} does is told here.") for i in range(corpus.MIN_RECORDS)]
    extra = [
        ("m.long", f"{paragraph}\n{paragraph}"),
        ("m.longer", paragraph + paragraph),
        ("m.unbroken", "word " * 1000),
        ("m.call", "call(a, b, c, d, e)"),
        ("m.short", "Too few words."),
        ("m.again", kept[0][1]),
    ]
    monkeypatch.setattr(corpus, "_documented_items", lambda: [item(*i) for i in kept + extra])
    answers = {r.source: r.response for r in corpus.standard_library_records()}
    assert list(answers.items())[: len(kept)] == kept
    assert set(answers) - dict(kept).keys() == {"m.long", "m.longer"}
    assert answers["m.long"] == paragraph.strip()
    assert answers["m.longer"] == (paragraph + paragraph)[:780].strip()
