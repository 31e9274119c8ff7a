import json
from fractions import Fraction

import numpy as np
import pytest

from train.data.loader import PackedLoader
from train.data.mixture import Share
from train.data.packing import IGNORE, Rows, pack
from train.text.tokenizer import Example


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


def test_a_batch_is_arrays_of_int32():
    rows = pack([Example(np.arange(5, dtype=np.int32), np.arange(5) > 2)] * 9, 12)
    batch = next(iter(PackedLoader(rows, 2)))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: ((2, 12), np.dtype(np.int32))
        for name in ("tokens", "labels", "segments", "positions")
    } | {"starts": ((2, 2), np.dtype(np.int32))}
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


def mixed(rows: int = 13) -> PackedLoader:
    shares = [Share(3, Fraction(2)), Share(rows - 3, Fraction(1))]
    return PackedLoader(rows_of(rows), 4, 5, shares)


def test_shares_come_by_weight_and_go_on_exactly():
    whole = take(mixed(), 12)
    served = np.concatenate(whole)
    assert np.count_nonzero(served < 3) == 2 * len(served) / 3
    first = mixed()
    assert take(first, 5) == whole[:5]
    second = mixed()
    second.set_state(json.loads(json.dumps(first.state())))
    assert take(second, 7) == whole[5:]


def test_an_epoch_of_shares_holds_all_rows():
    batches = mixed()
    assert batches.steps(1) == 8  # 30 rows, 10 of which are the second share's
    assert batches.epochs(15) == 2
    assert set(np.concatenate(take(batches, 8)).tolist()) == set(range(13))


@pytest.mark.parametrize(
    "other",
    [
        PackedLoader(rows_of(13), 4, seed=6),
        PackedLoader(rows_of(13), 2, seed=5),
        PackedLoader(rows_of(14), 4, seed=5),
        PackedLoader(rows_of(13, 9), 4, seed=5),
        PackedLoader(rows_of(13), 4, 5, [Share(6, Fraction(2)), Share(7, Fraction(1))]),
    ],
)
def test_a_position_in_other_data_is_refused(other):
    with pytest.raises(ValueError, match="the saved position belongs to other data"):
        PackedLoader(rows_of(13), 4, seed=5).set_state(other.state())


def test_what_is_no_position_is_refused():
    with pytest.raises(ValueError, match=r"the saved position is damaged: it holds \{\}"):
        PackedLoader(rows_of(13), 4).set_state({})


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
