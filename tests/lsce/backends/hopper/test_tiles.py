"""Tile sizes: what cannot run cannot be built, and what is chosen fits."""

import pytest
from hopper_on_cpu import problem
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lsce.backends.hopper import choose, tiles
from lsce.sparse import filter as filtering

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: tiles.ForwardTiles(tile_n=96),
        lambda: tiles.ForwardTiles(tile_n=128, tile_v=256),
        lambda: tiles.ForwardTiles(steps=8),
        lambda: tiles.ForwardTiles(tile_n=64, tile_v=256),
        lambda: tiles.BackwardTiles(tile_c=192),
        lambda: tiles.BackwardTiles(width=1000),
        lambda: tiles.BackwardTiles(tile_c=256, head_c=256, head_d=256),
        lambda: tiles.BackwardTiles(tile_c=128, head_c=256, head_d=64),
        lambda: tiles.BackwardTiles(cluster=4),
    ],
)
def test_tiles_that_cannot_run_cannot_be_built(wrong):
    with pytest.raises(ValueError, match=r"self\.|shared memory"):
        wrong()


@pytest.mark.parametrize("d", [64, 576, 640, 896, 2048, 2304, 3584, 4096, 5120])
def test_heuristic_tiles_fit_and_waste_little(d):
    chosen = choose.tiles_for(problem(d=d))
    for some in (chosen.sparse, chosen.exact):
        for tile in (some.hidden_d, some.head_d):
            assert -(-d // tile) * tile <= 1.2 * d


@pytest.mark.parametrize(
    ("n", "d", "splits"), [(2048, 576, 2), (8192, 576, 1), (2048, 4096, 1), (1, 64, 4), (0, 64, 4)]
)
def test_few_tokens_have_their_gradient_cut_into_sums(n, d, splits):
    """16 blocks of 3 tiles leave room for a second sum on 132 SMs; 256 tiles need none."""
    assert choose.heuristic(n, d, 49152, 132).sparse.hidden_splits == splits


@pytest.mark.parametrize(
    ("n", "d", "v", "most", "own"),
    [
        (8192, 2304, 256_000, 10, False),
        (32_768, 640, 262_144, 12, False),
        (32_768, 2304, 32_000, 5, False),  # of few classes any that fit
        (8192, 3584, 152_064, 18, True),
        (32_768, 4096, 128_256, 18, True),
        (8192, 4096, 128_256, 18, True),
        (16_384, 2304, 128_256, 18, True),
        (8192, 3584, 100_352, 7, True),  # what a quarter of optax's memory has room for
    ],
)
def test_flat_tokens_have_the_memory_of_others_where_that_is_enough(n, d, v, most, own):
    found = choose.heuristic(n, d, v, 132)
    sparse, flat, blocks = found.sparse, found.tail_where_flat, choose.cdiv(n, tiles.BLOCK)
    assert flat is not None
    assert flat.slots_per_block == most
    slots = sparse.slots_for(blocks, choose.cdiv(v, sparse.tile_c))
    room = 2 * (slots * tiles.BLOCK * sparse.tile_c + sparse.width * d)
    operands = 2 * n * d  # in 8 bits, twice
    needs = operands + 2 * most * flat.tile_c * (n + d)
    assert (needs > room) == own


@pytest.mark.parametrize(("n", "d", "v"), [(2048, 2304, 256_000), (32_768, 4096, 32_000)])
def test_flat_tokens_are_not_looked_for_where_it_does_not_pay(n, d, v):
    assert choose.heuristic(n, d, v, 132).tail_where_flat is None


@pytest.mark.parametrize(
    ("n", "d", "v", "chunks"),
    [(2048, 640, 262_144, 8), (512, 640, 262_144, 8), (4096, 3584, 152_064, 10)],
)
def test_few_tokens_have_few_chunks_of_8_bits(n, d, v, chunks):
    """In no more memory than 8,192 tokens may take, nor than a quarter of what optax needs."""
    columns = 256 * choose.heuristic(n, d, v, 132).tail.slots_per_block
    assert choose.cdiv(v, columns) == chunks
    assert 2 * columns * (n + d) <= n * v
    assert 2 * columns * (n + d) <= 2 * 256 * tiles.Tiles().tail.slots_per_block * (8192 + d)


@pytest.mark.parametrize(
    ("n", "d", "v", "fewer"),
    [(32768, 4096, 32000, True), (8192, 4096, 32000, False), (32768, 576, 49152, False)],
)
def test_chunks_shrink_where_that_keeps_a_quarter_of_the_memory(n, d, v, fewer):
    """Not where they fit as they are, nor where the gradients alone are more."""
    usual = tiles.BackwardTiles()
    sparse = choose.heuristic(n, d, v, 132).sparse
    assert (sparse.slots_per_block < usual.slots_per_block) == fewer
    slots = sparse.slots_for(n // 128, -(-v // 128))
    temporary = 2 * 128 * 128 * slots + 2 * sparse.width * d + 4 * n * d
    gradients = 2 * (n + v) * d
    quarter = (4 * n * v + gradients) / 4
    assert (temporary + gradients < quarter) == (n > 8192)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(n=56_274, d=4, v=111)
@given(n=st.integers(1, 65_536), d=st.integers(1, 128), v=st.integers(1, 1200))
def test_fused_layouts_fit(n, d, v):
    d, v, tile_c = 64 * d, 256 * v, 256
    groups, own = tiles.fused_layout(n, d, v, tile_c)
    pairs = -(-n // 256)
    assert 1 <= groups <= pairs
    others = v // tile_c - own
    if others:
        assert groups == 1
        # `plan.dense_work` makes two chunks; the second one's P stays in the first one's dC.
        assert 0 < others <= own
        slots, panels = others * pairs * 2, d // tile_c
        assert -(-slots // panels) * 128 <= own * tile_c
        assert 2 * own * tile_c * pairs * 256 <= tiles.FUSED_WHOLE_BYTES
    else:
        in_each = -(-pairs // groups)
        assert (groups - 1) * in_each < pairs  # none is empty
        # One group may also have all of P in its own buffer where no part of it fits into dC.
        most = tiles.FUSED_WHOLE_BYTES if groups == 1 else tiles.FUSED_BYTES
        assert in_each == 1 or 2 * (in_each - 1) * 256 * v < most


@given(n=st.integers(1, 10_000), d=st.integers(1, 128), v=st.integers(1, 1200))
def test_no_chunk_of_dc_is_written_over_the_p_of_one_that_is_not(n, d, v):
    d, v = 64 * d, 256 * v
    layout = tiles.layout_within_dc(n, d, v, 256)
    rows = -(-n // 256) * 256
    assert (layout is not None) == (rows <= d // 256 * 256)
    if layout is None:
        return
    assert layout.groups == 1
    # Tiles of 128 × 256, side by side in dC: those of all chunks up to one, but the first.
    for tile in range(layout.own, v // 256, layout.own):
        in_dc = -(-tile * (rows // 128) // (d // 256)) * 128
        assert in_dc <= tile * 256


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 65_536), d=st.integers(1, 128), v=st.integers(1, 300_000))
@example(n=2048, d=10, v=262_144)
@example(n=8192, d=12, v=50_257)
@example(n=8192, d=64, v=32_000)
@example(n=21_521, d=13, v=32_000)
@example(n=32_768, d=64, v=32_000)
@example(n=32_768, d=9, v=49_152)
def test_exact_layouts_fit(n, d, v):
    """In dC without overwriting what is still read; in groups within a quarter of naive optax's
    memory, or where the tail would be beyond it, too."""
    d = 64 * d
    layout = choose.exact_layout(n, d, v, 256)
    pairs, column_tiles = -(-n // 256), -(-v // 256)
    rows = 256 * pairs
    if layout is None:
        assert 2 * n * v > choose.WHOLE_BYTES
        return
    if layout == tiles.layout_within_dc(n, d, v, 256):
        return  # see above
    groups, own = layout
    if others := column_tiles - own:
        assert groups == 1
        assert -(-others * (rows // 128) // (d // 256)) * 128 <= own * 256 <= v
    if groups == 1:
        return
    assert own == column_tiles == v // 256 <= filtering.FEW_FOR_8_BITS // 256
    most = -(-pairs // groups) * 256
    last = rows - (groups - 1) * most
    assert last > 0
    fused = choose.heuristic(n, d, v, 132, groups).fused
    sums = 4 * fused.hidden_splits * fused.padded_d(d) * sum({most, last})
    temporary = 2 * most * v + 4 * most * d + sums + 2 * v * d + 2 * n * d
    # A group is of whole pairs of blocks, and a tile of dE may be wider than D.
    rounding = 2 * 256 * (2 * v + 36 * d) + 16 * most * 256
    within = temporary + 2 * (n + v) * d <= n * v + (n + v) * d / 2 + rounding
    assert within or (most <= 2 * d and choose.promised_of_the_tail(n, d, v) <= 0)


def test_fused_layouts():
    assert tiles.fused_layout(8192, 4096, 32_000, 256) == (1, 125)
    # P of the last columns fits into dC of the others, and of one tile more it would not.
    groups, own = tiles.fused_layout(8192, 2304, 256_000, 256)
    assert groups == 1

    def needed(own: int) -> int:
        return -(-(1000 - own) * 64 // 9) * 128

    assert needed(own) <= own * 256
    assert needed(own - 1) > (own - 1) * 256
    assert tiles.fused_layout(32768, 2304, 256_000, 256) == (8, 1000)
    assert tiles.fused_layout(16384, 128, 256_000, 256) == (4, 1000)
