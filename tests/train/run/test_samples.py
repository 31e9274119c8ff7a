"""Answers to held-out prompts: which prompts, compiled once, and a file that survives kills."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from train.data.records import Message, Record
from train.models import generation
from train.models.config import PRESETS
from train.models.decoder import Decoder
from train.run.samples import MOST_TOKENS, Prompts, Sample, write
from train.text import bpe

TOKENIZER = bpe.train(["what is it", "an ant"], 262)


def record(prompt: str, answer: str, *before: Message) -> Record:
    return Record((*before, Message("user", prompt), Message("assistant", answer)), "here")


def chosen(records: list[Record], count: int = 2) -> Prompts:
    return Prompts.of(records, count, TOKENIZER, length=30)


def test_the_first_prompts_that_fit_are_answered():
    records = [
        Record((Message("text", "plain text asks nothing"),), "here"),
        Record((Message("assistant", "Hello!"),), "here"),
        record("x" * 40, "too long to see"),
        record("what?", "an ant", Message("system", "Be brief.")),
        record("why?", "so"),
        record("who?", "you"),
    ]
    assert chosen(records).records == records[3:5]
    assert chosen(records).tokens == [TOKENIZER.encode_prompt(r.prompt) for r in records[3:5]]
    assert chosen(records, 9).records == records[3:]
    assert chosen(records, 0).records == []


def test_a_prompt_that_the_template_refuses_is_passed_over(monkeypatch):
    def refuse(self, messages):
        raise ValueError("roles must alternate")

    monkeypatch.setattr(bpe.BPE, "encode_prompt", refuse)
    assert chosen([record("what?", "an ant")]).records == []


@pytest.mark.usefixtures("quickly_compiled")
def test_answers_are_the_same_each_time_and_compiled_once():
    shape = dataclasses.replace(PRESETS["nano"], vocab_size=TOKENIZER.vocab_size, dropout=0.5)

    model = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(params=0)))
    graphdef, like = nnx.split(model)

    def params(seed: int) -> nnx.State:
        random = np.random.default_rng(seed)
        return jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape, np.float32), like)

    prompts = chosen([record("what?", "an ant"), record("is it an ant?", "no")])
    once = prompts.answered(nnx.merge(graphdef, params(0)), 4)
    compiled = generation._next._cache_size()
    assert prompts.answered(nnx.merge(graphdef, params(0)), 4) == once
    other = prompts.answered(nnx.merge(graphdef, params(1)), 5)
    assert generation._next._cache_size() == compiled
    assert [sample.answer for sample in other] != [sample.answer for sample in once]
    assert [(s.step, s.prompt, s.reference) for s in once] == [
        (4, "what?", "an ant"), (4, "is it an ant?", "no")
    ]  # fmt: skip
    for sample in once:
        assert 0 < len(sample.answer) <= MOST_TOKENS  # a byte each, at most


def test_a_sample_is_shown_in_four_lines_at_most():
    shown = str(Sample(20, "what\nis\nit?", "word " * 200, "an ant"))
    assert shown.splitlines()[:2] == ["step 20: sample", "  prompt:    what is it?"]
    assert shown.splitlines()[2].endswith("word …")
    assert shown.splitlines()[3] == "  reference: an ant"


def test_samples_of_a_step_are_written_once_and_those_of_later_ones_removed(tmp_path):
    def rows() -> list[tuple[int, str]]:
        lines = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
        return [(row["step"], row["answer"]) for row in map(json.loads, lines)]

    write(tmp_path, 3, [])
    assert not (tmp_path / "samples.jsonl").exists()
    for step in (2, 4, 6):
        write(tmp_path, step, [Sample(step, "p", f"é{i}", "r") for i in range(2)])
    assert rows() == [(2, "é0"), (2, "é1"), (4, "é0"), (4, "é1"), (6, "é0"), (6, "é1")]
    write(tmp_path, 4, [Sample(4, "p", "again", "r")])
    assert rows() == [(2, "é0"), (2, "é1"), (4, "again")]
    write(tmp_path, 3, [])  # where a run goes on
    assert rows() == [(2, "é0"), (2, "é1")]
    before = (tmp_path / "samples.jsonl").read_text("utf-8") + "{\n"
    (tmp_path / "samples.jsonl").write_text(before, "utf-8")
    with pytest.raises(ValueError, match=r"samples\.jsonl:3 is not a sample: remove the line"):
        write(tmp_path, 9, [])
