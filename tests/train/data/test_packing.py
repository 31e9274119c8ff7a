import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.packing import IGNORE, Rows, pack
from train.text.tokenizer import Example


def example(tokens: list[int], loss_from: int) -> Example:
    array = np.array(tokens, np.int32)
    return Example(array, np.arange(len(array)) >= loss_from)


def unpack(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """The (tokens, labels) of every segment, found by scanning the rows one token at a time."""
    found = []
    for row in range(len(rows)):
        previous = 0
        for t in range(rows.tokens.shape[1]):
            token, label, segment, position = (a[row, t].item() for a in vars(rows).values())
            if segment == 0:
                assert (token, label, position) == (0, IGNORE, 0)
            elif segment == previous:
                found[-1][0].append(token)
                found[-1][1].append(label)
                assert position == len(found[-1][0]) - 1
            else:
                assert segment == previous + 1  # 1, 2, …, and padding only at the end
                assert position == 0
                found.append(([token], [label]))
            previous = segment if segment else 10**9
    return found


@st.composite
def many_examples(draw):
    length = draw(st.integers(1, 24))
    sizes = draw(st.lists(st.integers(1, length), max_size=30))
    starts = [draw(st.integers(0, size)) for size in sizes]
    # The tokens are all different, so that a wrong one cannot pass for a right one.
    tokens = np.split(np.arange(100, 100 + sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
    return length, [example(t.tolist(), s) for t, s in zip(tokens, starts, strict=True)]


def expected_labels(example: Example) -> list[int]:
    shifted = [*example.tokens[1:].tolist(), IGNORE]
    has_loss = [*example.loss_mask[1:].tolist(), False]
    return [token if loss else IGNORE for token, loss in zip(shifted, has_loss, strict=True)]


@given(many_examples())
def test_every_example_is_packed_whole_and_once(packed):
    length, examples = packed
    rows = pack(examples, length)
    assert rows.tokens.shape[1] == length
    expected = [(e.tokens.tolist(), expected_labels(e)) for e in examples]
    assert sorted(unpack(rows)) == sorted(expected)


@given(many_examples())
def test_no_label_comes_from_another_segment(packed):
    length, examples = packed
    rows = pack(examples, length)
    for row in range(len(rows)):
        for t in np.flatnonzero(rows.labels[row] != IGNORE):
            assert rows.labels[row, t] == rows.tokens[row, t + 1]
            assert rows.segments[row, t] == rows.segments[row, t + 1] > 0


@given(many_examples())
def test_no_two_rows_could_be_one(packed):
    length, examples = packed
    used = np.sort(np.count_nonzero(pack(examples, length).segments, axis=1))
    assert np.all(used > 0)
    assert len(used) < 2 or used[0] + used[1] > length


def test_one_row_by_hand():
    rows = pack([example([11, 12, 13, 14], 2)], 6)
    assert {name: array.tolist() for name, array in vars(rows).items()} == {
        "tokens": [[11, 12, 13, 14, 0, 0]],
        "labels": [[-100, 13, 14, -100, -100, -100]],
        "segments": [[1, 1, 1, 1, 0, 0]],
        "positions": [[0, 1, 2, 3, 0, 0]],
    }
    assert {array.dtype for array in vars(rows).values()} == {np.dtype(np.int32)}


def test_several_turns_keep_their_gaps_of_loss():
    turns = Example(np.arange(10, 16, dtype=np.int32), np.array([0, 1, 0, 0, 1, 1], bool))
    assert pack([turns], 6).labels.tolist() == [[11, -100, -100, 14, 15, -100]]


def test_little_of_many_real_lengths_is_padding():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4.8, 0.7, 20_000), 8, 512).astype(int)
    examples = [example([7] * n, n // 2) for n in lengths.tolist()]
    rows = pack(examples, 512)
    assert np.count_nonzero(rows.tokens == 7) == lengths.sum()
    assert np.mean(rows.segments == 0) < 0.002


def test_nothing_packs_to_no_rows():
    rows = pack([], 8)
    assert len(rows) == 0
    assert rows.labels.shape == (0, 8)


def test_a_batch_is_some_rows():
    rows = pack([example([i] * 8, 0) for i in range(100, 105)], 8)
    batch = rows[np.array([3, 0, 3])]
    assert list(batch) == ["tokens", "labels", "segments", "positions", "starts"]
    np.testing.assert_array_equal(batch["tokens"], rows.tokens[[3, 0, 3]])
    np.testing.assert_array_equal(rows[1:3]["labels"], rows.labels[1:3])


def test_starts_are_where_examples_begin():
    rows = pack([example([1] * size, 0) for size in (3, 8, 2, 2)], 8)
    assert rows.starts.tolist() == [[0, 8, 8, 8], [0, 3, 5, 8]]
    assert rows[1:]["starts"].tolist() == [[0, 3, 5, 8]]
    assert rows.starts.dtype == np.int32
    assert pack([example([1] * 8, 0)] * 2, 8).starts.tolist() == [[0], [0]]
    assert pack([example([1], 0)] * 9, 9).starts.tolist() == [[*range(9), *[9] * 7]]
    assert pack([], 8).starts.shape == (0, 1)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit a row of 8"):
        pack([example([1] * 4, 0), example([1] * 9, 0)], 8)
