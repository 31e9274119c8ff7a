import contextlib
import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT, SHARED_DATA

from train.data import dataset, encode, files
from train.data.dataset import Data
from train.data.packing import IGNORE
from train.evaluation.tasks.held_out import Exam

SHARED = SHARED_DATA


def build(data: Sequence[Path], cache_dir: Path, **options: Any) -> Data:
    small = {"held_out": 0.1, "max_length": 64, "batch_size": 2, "vocab_size": 400, "seed": 0}
    return dataset.build(data=data, cache_dir=cache_dir, **small | options)


def write_records(path: Path, count: int, response: str = "the answer is {}, as always") -> Path:
    lines = [
        {"prompt": f"What is the answer to question {i}?", "completion": response.format(i)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def draw(path: Path, cache_dir: Path, count: int, state: dict | None = None) -> list:
    """Builds, goes to `state`, and describes the next batches and all else there is."""
    data = build([path], cache_dir, batch_size=4, seed=7)
    exam = Exam.of(data, seed=7)
    if state is not None:
        data.train.set_state(state)
    digests = []
    for _ in range(count):
        batch = next(data.train)
        digests.append(hashlib.sha256(b"".join(a.tobytes() for a in batch.values())).hexdigest())
    return [digests, data.train.state(), exam.held_out.tokens.tolist(), repr(exam.questions)]


def draw_elsewhere(*arguments: object) -> list:
    code = """
import json, pickle, sys, test_dataset
print(json.dumps(test_dataset.draw(*pickle.loads(bytes.fromhex(sys.argv[1])))))
"""
    command = [sys.executable, "-c", code, pickle.dumps(arguments).hex()]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    environment = os.environ | {"PYTHONPATH": path}
    return json.loads(subprocess.check_output(command, env=environment, text=True))


@pytest.mark.slow
def test_a_fresh_process_goes_on_bit_for_bit(tmp_path):
    path = write_records(tmp_path / "data.jsonl", 120)
    whole, end, *rest = draw(path, tmp_path / "cache", 20)
    first, middle, *rest_of_first = draw_elsewhere(path, tmp_path / "other", 9)  # trains a BPE anew
    second, end_of_second, *_ = draw_elsewhere(path, tmp_path / "cache", 11, middle)
    assert len(set(whole)) == 20
    assert first + second == whole
    assert end_of_second == end
    assert rest_of_first == rest


def test_counts_add_up(tmp_path, caplog):
    path = write_records(tmp_path / "data.jsonl", 60)
    with path.open("a") as file:
        for prompt, completion in (
            ("a", ""),
            (" ".join(map(str, range(999))), "no room"),
            ("b", "long " * 99),
        ):
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    with caplog.at_level(logging.WARNING):
        data = build([path], tmp_path)
    counts = data.counts
    assert counts.records == 63 == counts.train + counts.held_out + counts.empty + counts.dropped
    assert (counts.empty, counts.dropped, counts.shortened) == (1, 1, 1)
    assert f"1 record(s) left out, for a response is empty:\n  {path}:61" in caplog.text
    assert f"in max_length=64:\n  {path}:62" in caplog.text
    rows = data.train.rows
    assert counts.train_tokens == np.count_nonzero(rows.tokens)
    assert counts.train_labels == np.count_nonzero(rows.labels != IGNORE)
    assert rows.padding == pytest.approx(1 - counts.train_tokens / rows.tokens.size)
    segments = [int(part.segments.max(axis=1).sum()) for part in (rows, data.held_out)]
    assert segments == [counts.train, counts.held_out]
    for part in ("63 records", "1 left out", "1 dropped", "1 shortened"):
        assert part in str(counts)


def test_the_tokenizer_has_not_seen_what_is_held_out(tmp_path, monkeypatch):
    path = write_records(tmp_path / "data.jsonl", 80, "the secret is number{0}number{0}")
    seen = []

    def spy(texts, *rest):
        seen.extend(texts)
        return original(texts, *rest)

    original = dataset.bpe.train_or_load
    monkeypatch.setattr(dataset.bpe, "train_or_load", spy)
    data = build([path], tmp_path)
    held_out = {record.prompt[0].content for record in data.held_out_records}
    assert len(held_out) == data.counts.held_out > 3
    assert not held_out & set(seen)
    assert len(seen) == 2 * data.counts.train


def test_the_tokenizer_learns_nothing_that_no_row_can_hold(tmp_path, monkeypatch):
    seen = []

    def spy(texts, *rest):
        seen.extend(texts)
        return original(texts, *rest)

    original = dataset.bpe.train_or_load
    monkeypatch.setattr(dataset.bpe, "train_or_load", spy)
    path = write_records(tmp_path / "data.jsonl", 20, "{}" + "x" * 100_000)
    build([path], tmp_path)
    record = len("What is the answer to question 1?") + max(map(len, seen))
    assert record == 64 * dataset.MAX_CHARACTERS_PER_TOKEN


class Strict:
    """A tokenizer whose template refuses some records."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, records):
        for record in records:
            if "question 7?" in record.messages[0].content:
                raise ValueError(f"{record.source}: roles must alternate")
        return self.tokenizer.encode(records)


@pytest.mark.parametrize("share", [0.1, 0.9])  # of which one holds out what is refused
def test_what_a_template_refuses_is_bad_too(tmp_path, caplog, share):
    path = write_records(tmp_path / "data.jsonl", 60)
    whole = build([path], tmp_path, held_out=share)
    options = {"tokenizer": Strict(whole.tokenizer), "held_out": share}
    with pytest.raises(ValueError, match=rf"{path}:8: roles must alternate"):
        build([path], tmp_path, **options)
    data = build([path], tmp_path, skip_bad_records=True, **options)
    assert (data.counts.skipped, data.counts.records, data.counts.dropped) == (1, 59, 0)
    assert data.counts.train + data.counts.held_out == 59
    assert f"1 record(s) skipped, for they are bad:\n  {path}:8: roles must" in caplog.text
    sources = [record.source for record in data.held_out_records]
    assert len(sources) == data.counts.held_out
    assert f"{path}:8" not in sources


def test_what_takes_long_shows_how_far_it_is(tmp_path, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def progress(what, total=None):
        counts = []
        shown.append((what, total, counts))
        yield counts.append

    for module in (files, encode, dataset.bpe):
        monkeypatch.setattr(module, "progress", progress)
    build([write_records(tmp_path / "data.jsonl", 1200)], tmp_path)
    assert [(what, total, sum(counts)) for what, total, counts in shown] == [
        ("reading data.jsonl", None, 1200),
        ("training the vocabulary", None, 0),
        ("encoding records", 1200, 1200),
    ]
    assert len(shown[-1][-1]) > 1


def test_bad_records_are_skipped_counted_and_named(tmp_path, caplog):
    path = write_records(tmp_path / "data.jsonl", 40)
    with path.open("a") as file:
        file.write('{"a": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=rf"{path}:41: none of the fields"):
        build([path], tmp_path)
    data = build([path], tmp_path, skip_bad_records=True)
    assert (data.counts.records, data.counts.skipped) == (40, 2)
    assert f"2 record(s) skipped, for they are bad:\n  {path}:41: none" in caplog.text
    assert f"\n  {path}:42: invalid JSON" in caplog.text
    assert "2 skipped, for they are bad" in str(data.counts)


def test_several_files_and_nothing_held_out(tmp_path):
    paths = [write_records(tmp_path / f"{i}.jsonl", 3, f"file {i}: {{}}") for i in range(2)]
    data = build(paths, tmp_path, held_out=0)
    assert (data.counts.train, data.counts.held_out) == (6, 0)
    assert len(data.held_out) == 0
    assert data.held_out_records == []


def test_files_are_seen_by_weight_and_rows_are_of_one_file(tmp_path):
    words = ("apple", "brick")
    paths = [write_records(tmp_path / f"{w}.jsonl", 30 * (i + 1), w) for i, w in enumerate(words)]
    data = build([f"{paths[0]}:3", f"{paths[1]}:1"], tmp_path, batch_size=4)
    seen = np.concatenate([next(data.train)["tokens"] for _ in range(20)])
    texts = [data.tokenizer.decode(row.tolist()) for row in seen]
    of_first, of_second = ([word in text for text in texts] for word in words)
    assert (sum(of_first), sum(of_second)) == (60, 20)
    assert not any(map(all, zip(of_first, of_second, strict=True)))
    assert [counts.name for counts in data.files] == ["apple.jsonl", "brick.jsonl"]
    assert sum(counts.train for counts in data.files) == data.counts.train


def test_equal_records_are_seen_equally_without_weights(tmp_path):
    paths = [write_records(tmp_path / f"{i}.jsonl", 20, f"file {i}: {{}}") for i in range(2)]
    (joined := tmp_path / "joined.jsonl").write_text("".join(p.read_text() for p in paths))
    apart, together = build(paths, tmp_path), build([joined], tmp_path)
    np.testing.assert_array_equal(apart.train.rows.tokens, together.train.rows.tokens)
    np.testing.assert_array_equal(next(apart.train)["labels"], next(together.train)["labels"])


def test_evaluation_may_have_files_of_its_own(tmp_path, caplog):
    path = write_records(tmp_path / "data.jsonl", 30)
    other = write_records(tmp_path / "other.jsonl", 33, "another answer, {}")
    data = build([path], tmp_path, eval_data=[other], held_out=0.5)
    assert (data.counts.train, data.counts.held_out) == (30, 33)
    assert {Path(r.source.partition(":")[0]) for r in data.held_out_records} == {other}
    assert f"30 of 33 record(s) of --eval-data ask what training records ask too:\n  {other}:1" in (
        caplog.text
    )
    assert "another" not in data.tokenizer.decode(data.train.rows.tokens.ravel().tolist())


def test_a_run_goes_on_with_the_held_out_records_that_it_had(tmp_path):
    path = write_records(tmp_path / "data.jsonl", 30)
    other = write_records(tmp_path / "other.jsonl", 33, "another answer, {}")
    data = build([path], tmp_path, eval_data=[path])
    position = json.loads(json.dumps(data.position()))
    data.go_to(position)
    data.go_to({name: position[name] for name in ("identity", "iterator")})  # of before 2026-11-29
    with pytest.raises(ValueError, match="belongs to other held-out records"):
        build([path], tmp_path, eval_data=[other]).go_to(position)


def test_a_pretrained_tokenizer_takes_the_place_of_the_bpe(tmp_path, monkeypatch):
    path = write_records(tmp_path / "data.jsonl", 30)
    own = build([path], tmp_path)
    monkeypatch.setattr(dataset.bpe, "train_or_load", None)  # is not called
    data = build([path], tmp_path, tokenizer=own.tokenizer)
    np.testing.assert_array_equal(data.train.rows.tokens, own.train.rows.tokens)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_length": 5}, "max_length=5 must be at least 8 tokens"),
        ({"held_out": 1.0}, "held_out must be in"),
        ({"vocab_size": 100}, "vocab_size must be at least 262, got 100"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"max_length": 8, "vocab_size": 262},
            "no training record has a response within max_length=8",
        ),
    ],
)
def test_build_refuses_bad_options(tmp_path, options, what):
    path = write_records(tmp_path / "data.jsonl", 20)
    with pytest.raises(ValueError, match=what):
        build([path], tmp_path, **options)


def test_build_refuses_data_without_a_response(tmp_path):
    path = write_records(tmp_path / "data.jsonl", 4, " ")
    with pytest.raises(ValueError, match="every response of the 4 records is empty"):
        build([path], tmp_path)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert dataset.default_cache_dir() == Path("/somewhere/lsce")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert dataset.default_cache_dir() == Path.home() / ".cache" / "lsce"


def test_the_default_data(tmp_path):
    data = build((), tmp_path, batch_size=8, max_length=256, vocab_size=8192)
    assert data.tokenizer.vocab_size == 8192
    assert data.counts.train > 3500
    assert len(Exam.of(data, seed=0).questions) > 300
    assert data.counts.dropped == data.counts.empty == 0
    assert data.train.rows.padding < 0.03
    batch = next(data.train)
    text = data.tokenizer.decode(batch["tokens"][0], skip_special=False)
    assert text.startswith("<|bos|><|user|>")
    learned = data.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0], skip_special=False)
    assert "<|end|>" in learned
    assert "<|user|>" not in learned


@pytest.mark.skipif(not SHARED.exists(), reason="no folder of data sets beside the repository")
@pytest.mark.parametrize("name", ["alpaca/alpaca_20k-00002.jsonl", "dolly/dolly_3k.jsonl"])
def test_published_data_sets(tmp_path, name):
    data = build([SHARED / name], tmp_path, max_length=512, vocab_size=1000)
    counts = data.counts
    assert counts.train + counts.held_out + counts.empty + counts.dropped == counts.records
    assert counts.train > 0.8 * counts.records
    assert data.train.rows.padding < 0.05
    assert len(Exam.of(data, seed=0).questions) > 0.9 * counts.held_out
