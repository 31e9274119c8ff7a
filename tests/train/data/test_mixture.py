from fractions import Fraction

from train.data.mixture import Share, epoch, order


def test_rows_come_by_weight_and_all_before_any_comes_again():
    shares = [Share(6, Fraction(2)), Share(4, Fraction(1)), Share(50, Fraction(3, 2))]
    indices = order(shares, seed=3)
    drawn = [indices[i] for i in range(900)]
    of_share = [[i for i in drawn if low <= i < high] for low, high in ((0, 6), (6, 10), (10, 60))]
    assert [len(part) for part in of_share] == [400, 200, 300]
    for start in range(0, 900, 9):  # in every stretch of them
        some = drawn[start : start + 9]
        counts = [sum(i < 6 for i in some), sum(6 <= i < 10 for i in some)]
        assert counts[0] in (3, 4, 5)
        assert counts[1] in (1, 2, 3)
    for part, share in zip(of_share, shares, strict=True):
        epochs = [part[i : i + share.rows] for i in range(0, len(part) - share.rows, share.rows)]
        assert {len(set(e)) for e in epochs} == {share.rows}
        assert len(set(map(tuple, epochs))) > 1  # in an order of its own each time


def test_the_seed_decides():
    shares = [Share(30, Fraction(2)), Share(30, Fraction(1))]
    drawn = [[order(shares, seed)[i] for i in range(60)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    first, second = ([i % 30 for i in drawn[0] if i // 30 == part] for part in (0, 1))
    assert first[: len(second)] != second  # files of one size have orders of their own


def test_an_epoch_holds_every_row():
    assert epoch([Share(13)]) == 13
    assert epoch([Share(100, Fraction(2)), Share(1000, Fraction(1))]) == 3000
    assert epoch([Share(100, Fraction(1, 2)), Share(10, Fraction(1, 2))]) == 200
