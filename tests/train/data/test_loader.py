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

from train.data import encode, files, loader
from train.data.loader import Data, PackedLoader
from train.data.packing import IGNORE, Rows, pack
from train.evaluation.tasks.held_out import Exam
from train.text.tokenizer import Example

SHARED = SHARED_DATA


def rows_of(count: int, length: int = 8) -> Rows:
    """Row i holds the number i + 10 in each place."""
    tokens = np.arange(10, 10 + count, dtype=np.int32)[:, None].repeat(length, axis=1)
    return Rows(tokens, tokens.copy(), np.ones_like(tokens), np.zeros_like(tokens))


def take(batches: PackedLoader, count: int) -> list[list[int]]:
    """Which rows the next batches hold."""
    return [(next(batches)["tokens"][:, 0] - 10).tolist() for _ in range(count)]


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (13, 4), (3, 8), (2, 1), (1, 1)])
def test_each_epoch_is_all_rows_once(rows, batch_size):
    batches = take(PackedLoader(rows_of(rows), batch_size, seed=3), 3 * rows)
    assert {len(batch) for batch in batches} == {batch_size}
    served = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(served[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_each_epoch_has_an_order_of_its_own():
    batches = PackedLoader(rows_of(40), 40, seed=0)
    first, second, third = take(batches, 3)
    assert first != second != third != list(range(40)) != first


def test_the_seed_decides_the_order():
    order = [take(PackedLoader(rows_of(40), 8, seed), 10) for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]
    # Neighbouring seeds have no epochs in common, as they would if seed and epoch were added up.
    epochs = [tuple(e) for seed in range(4) for e in take(PackedLoader(rows_of(50), 50, seed), 3)]
    assert len(set(epochs)) == 12


def test_a_batch_is_four_arrays_of_int32():
    rows = pack([Example(np.arange(5, dtype=np.int32), np.arange(5) > 2)] * 9, 12)
    batch = next(iter(PackedLoader(rows, 2)))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: ((2, 12), np.dtype(np.int32))
        for name in ("tokens", "labels", "segments", "positions")
    }
    assert np.all(batch["labels"][:, 4] == IGNORE)
    batch["tokens"][:] = -1
    assert rows.tokens.min() >= 0  # a batch is a copy


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_restored_loader_goes_on_exactly(taken):
    whole = take(PackedLoader(rows_of(130), 40, seed=5), 12)
    first = PackedLoader(rows_of(130), 40, seed=5)
    assert take(first, taken) == whole[:taken]
    state = json.loads(json.dumps(first.state()))
    assert take(first, 3) == whole[taken : taken + 3]  # going on does not change what was saved

    second = PackedLoader(rows_of(130), 40, seed=5)
    take(second, 2)
    second.set_state(state)
    assert take(second, 12 - taken) == whole[taken:]
    first.set_state(state)
    assert take(first, 1) == whole[taken : taken + 1]


@pytest.mark.parametrize(
    "other",
    [
        PackedLoader(rows_of(13), 4, seed=6),
        PackedLoader(rows_of(13), 2, seed=5),
        PackedLoader(rows_of(14), 4, seed=5),
        PackedLoader(rows_of(13, 9), 4, seed=5),
    ],
)
def test_a_position_in_other_data_is_refused(other):
    with pytest.raises(ValueError, match="the saved position belongs to other data"):
        PackedLoader(rows_of(13), 4, seed=5).set_state(other.state())


def test_steps_of_some_epochs():
    batches = PackedLoader(rows_of(13), 4)
    assert [batches.steps(epochs) for epochs in (0.1, 1, 2, 8)] == [1, 4, 7, 26]
    assert PackedLoader(rows_of(10), 1).steps(1.1) == 11  # 1.1 · 10 is more in binary
    assert [PackedLoader(rows_of(3), 64).epochs(steps) for steps in (1, 3)] == [64 / 3, 64]


@pytest.mark.parametrize(
    ("rows", "batch_size", "seed", "what"),
    [
        (3, 0, 0, "batch_size must be at least 1, got 0"),
        (3, 1, -1, "seed must be in"),
        (3, 1, 2**32, "seed must be in"),
        (0, 1, 0, "there are no rows"),
    ],
)
def test_bad_options_are_refused(rows, batch_size, seed, what):
    with pytest.raises(ValueError, match=what):
        PackedLoader(rows_of(rows), batch_size, seed)


def build(data: Sequence[Path], cache_dir: Path, **options: Any) -> Data:
    small = {"held_out": 0.1, "max_length": 64, "batch_size": 2, "vocab_size": 400, "seed": 0}
    return loader.build(data=data, cache_dir=cache_dir, **small | options)


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
import json, pickle, sys, test_loader
print(json.dumps(test_loader.draw(*pickle.loads(bytes.fromhex(sys.argv[1])))))
"""
    command = [sys.executable, "-c", code, pickle.dumps(arguments).hex()]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    environment = os.environ | {"PYTHONPATH": path}
    return json.loads(subprocess.check_output(command, env=environment, text=True))


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
    assert counts.train_rows == len(rows)
    assert counts.train_tokens == np.count_nonzero(rows.tokens)
    assert counts.train_labels == np.count_nonzero(rows.labels != IGNORE)
    assert counts.padding == pytest.approx(1 - counts.train_tokens / rows.tokens.size)
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

    original = loader.bpe.train_or_load
    monkeypatch.setattr(loader.bpe, "train_or_load", spy)
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

    original = loader.bpe.train_or_load
    monkeypatch.setattr(loader.bpe, "train_or_load", spy)
    path = write_records(tmp_path / "data.jsonl", 20, "{}" + "x" * 100_000)
    build([path], tmp_path)
    record = len("What is the answer to question 1?") + max(map(len, seen))
    assert record == 64 * loader.MAX_CHARACTERS_PER_TOKEN


def test_what_takes_long_shows_how_far_it_is(tmp_path, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def progress(what, total=None):
        counts = []
        shown.append((what, total, counts))
        yield counts.append

    for module in (files, encode, loader.bpe):
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
    assert loader.default_cache_dir() == Path("/somewhere/lsce")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert loader.default_cache_dir() == Path.home() / ".cache" / "lsce"


def test_the_default_data(tmp_path):
    data = build((), tmp_path, batch_size=8, max_length=256, vocab_size=8192)
    assert data.tokenizer.vocab_size == 8192
    assert data.counts.train > 3500
    assert len(Exam.of(data, seed=0).questions) > 300
    assert data.counts.dropped == data.counts.empty == 0
    assert data.counts.padding < 0.03
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
    assert counts.padding < 0.05
    assert len(Exam.of(data, seed=0).questions) > 0.9 * counts.held_out
