"""The tuner without a GPU: what it tries, how it chooses, what it prints; the timing is made up."""

import dataclasses
import io
import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import tune
from benchmarks.inputs import cases, random
from benchmarks.measure.timing import Timing
from lsce.backends import hopper
from lsce.backends.hopper.choose import heuristic
from lsce.backends.hopper.tiles import SHARED_MEMORY, BackwardTiles, ForwardTiles, Tiles

CASE = cases.find("gemma2-2b")
SMALL = cases.Case("small", 256, 64, 512)
START = heuristic(CASE.n, CASE.d, CASE.v, 132)
SIZES = sorted({case.d for case in cases.CASES.values()})


def trial(stage: tune.Stage, chosen: Tiles, ratio: float = 2.0, **fields) -> tune.Trial:
    """A trial of a device that multiplies in 10 ms."""
    given = {"temporary_mb": 100.0, "results": (1.0, 2.0, 3.0)} | fields
    return tune.Trial(stage, chosen, Timing(1.0, 10 * ratio, 30.0, 5, 1), 10.0, **given)


# What to try


@pytest.mark.parametrize("stage", tune.STAGES)
@pytest.mark.parametrize("d", SIZES)
def test_candidates_are_the_heuristic_and_others_that_can_be_built(stage, d):
    start = heuristic(8192, d, 128_256, 132)
    base = getattr(start, stage)
    for axes in tune.passes(stage, start, d):
        found = tune.candidates(base, axes)
        assert found[0] == base
        assert len(set(found)) == len(found) > 1
        assert all(dataclasses.replace(candidate) == candidate for candidate in found)
        # Few enough for a stage to take minutes, at some seconds a compilation.
        assert len(found) <= 16
        # Also from elsewhere: a table's entry may have gone astray.
        assert base in tune.candidates(found[-1], axes)


def test_what_does_not_fit_is_left_out():
    axes = ([{"tile_n": 64}, {"tile_n": 128}], [{"tile_v": 128}, {"tile_v": 256}], [{"steps": 5}])
    found = tune.candidates(ForwardTiles(), axes)
    assert [(t.tile_n, t.tile_v, t.steps) for t in found] == [(128, 128, 4), (64, 128, 5)]
    assert all(t.shared_memory <= SHARED_MEMORY for t in found)


def test_every_field_of_the_kernels_is_searched():
    for stage in tune.STAGES:
        axes = [axis for some in tune.passes(stage, START, CASE.d) for axis in some]
        tried = {name for axis in axes for change in axis for name in change}
        fields = {field.name for field in dataclasses.fields(getattr(START, stage))}
        kept = {"sparse": {"stage"}, "exact": {"stage", "width", "slots", "blocks"}}
        assert tried == fields - kept.get(stage, set())


# The search


SPARSE_BOTTOM = BackwardTiles(
    width=16384,
    slots=640,
    slots_per_block=10,
    tile_c=256,
    hidden_d=192,
    hidden_splits=2,
    head_c=256,
    head_d=128,
    steps=3,
    cluster=1,
)


def cost(stage: tune.Stage, chosen: Tiles) -> tune.Trial:
    """A valley in every field, apart from each other, at tiles far from the heuristic's."""
    bottom = {
        "forward": ForwardTiles(64, 256, 32, 6, 1),
        "sparse": SPARSE_BOTTOM,
        "exact": BackwardTiles(
            slots=0, slots_per_block=16, hidden_d=128, hidden_splits=2, head_d=192, steps=6
        ),
    }[stage]
    part = getattr(chosen, stage)
    pairs = zip(dataclasses.astuple(part), dataclasses.astuple(bottom), strict=True)
    return trial(stage, chosen, 1 + sum(abs(np.log2(max(a, 1) / max(b, 1))) for a, b in pairs))


def costs(stage: tune.Stage, candidates: list[Tiles]) -> tune.Round:
    return [cost(stage, chosen) for chosen in candidates]


def test_the_search_finds_the_best_of_each_stage_and_starts_from_it():
    best, rounds = tune.tune(START, CASE.d, costs)
    assert best.forward == ForwardTiles(64, 256, 32, 6, 1)
    assert best.sparse == SPARSE_BOTTOM
    assert cost("exact", best).ratio == 1.0
    trials = list(itertools.chain(*rounds))
    searched = [trial for trial in trials if trial.tiles.forward != START.forward]
    assert {t.tiles.forward for t in searched if t.stage != "forward"} == {best.forward}
    assert {t.tiles.sparse for t in trials if t.stage == "exact"} == {best.sparse}
    assert len({(t.stage, t.tiles) for t in trials}) < len(trials) < 100


def test_a_round_starts_with_the_tiles_to_beat_and_compares_only_its_own():
    """Each round is twice as fast as the one before, as if clocks had changed."""
    met: list[list[Tiles]] = []

    def run(stage, candidates):
        met.append(candidates)
        fast = candidates[-1]
        return [trial(stage, c, (1.9 if c == fast else 2.0) / 2 ** len(met)) for c in candidates]

    best, rounds = tune.tune(START, CASE.d, run, stages=("forward",))
    assert [[t.tiles for t in trials] for trials in rounds] == met
    first, second, last = met
    assert (first[0], second[0]) == (START, first[-1])
    assert last == [START, second[-1]]
    assert best == second[-1]


def test_chosen_stages_alone():
    best, rounds = tune.tune(START, CASE.d, costs, stages=("exact",))
    assert {t.stage for trials in rounds for t in trials} == {"exact"}
    assert (best.forward, best.sparse) == (START.forward, START.sparse)
    assert best.exact != START.exact


@pytest.mark.parametrize(("again", "stays"), [(1.9, True), (1.97, False), (2.1, False)])
def test_a_lucky_winner_does_not_stay(again, stays):
    """The first tiles take 2.0, each other one 2.0 or more but for a single fast sample."""
    lucky = dataclasses.replace(START, exact=dataclasses.replace(START.exact, slots_per_block=16))

    def run(stage, candidates):
        fast = 1.0 if len(candidates) > 2 else again
        return [trial(stage, c, fast if c == lucky else 2.0) for c in candidates]

    best, rounds = tune.tune(START, CASE.d, run, stages=("exact",))
    assert best == (lucky if stays else START)
    assert [t.tiles for t in rounds[-1]] == [START, lucky]


def test_failures_are_reported_and_never_win():
    def run(stage, candidates):
        failed = [c.forward.cluster == 1 for c in candidates]
        return [
            tune.Trial(stage, c, failure="ValueError: no") if f else cost(stage, c)
            for c, f in zip(candidates, failed, strict=True)
        ]

    told = []
    best, rounds = tune.tune(
        START, CASE.d, run, stages=("forward",), announce=lambda *it: told.append(it)
    )
    assert best.forward == ForwardTiles(64, 256, 32, 6, 2)
    failures = {t.failure for trials in rounds for t in trials if t.tiles.forward.cluster == 1}
    assert failures == {"ValueError: no"}
    assert [new for _, new in told] == rounds
    assert told[-1][0] == best


def test_where_all_fails_the_start_stays():
    def run(stage, candidates):
        return [tune.Trial(stage, c, failure="no GPU memory") for c in candidates]

    best, rounds = tune.tune(START, CASE.d, run)
    assert best == START
    assert all(t.ratio == np.inf for trials in rounds for t in trials)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"results": (1.0, 2.0, 3.1)}, "wrong: .* instead of"),
        ({"results": (1.0, 2.0, np.nan)}, "wrong"),
        ({"temporary_mb": 126.0}, r"more than 125\.0 MB"),
    ],
)
def test_what_is_wrong_or_large_cannot_win(fields, reason):
    def run(stage, candidates):
        fast = [c.exact.tile_c == 128 for c in candidates]
        return [
            trial(stage, c, 1.0 if f else 2.0, **(fields if f else {}))
            for c, f in zip(candidates, fast, strict=True)
        ]

    best, rounds = tune.tune(START, CASE.d, run, stages=("exact",))
    assert best == START
    failed = [t for trials in rounds for t in trials if t.failure is not None]
    assert {t.tiles.exact.tile_c for t in failed} == {128}
    assert all(re.match(reason, t.failure) for t in failed)


@pytest.mark.parametrize(
    ("promised", "wins"), [(110.0, True), (104.0, False), (90.0, False), (np.inf, True)]
)
def test_a_promise_of_memory_is_kept(promised, wins):
    """The first tiles hold 100 MB, a faster candidate 105."""
    fast = dataclasses.replace(START, exact=dataclasses.replace(START.exact, cluster=1))

    def run(stage, candidates):
        held = {True: {"temporary_mb": 105.0}, False: {}}
        return [trial(stage, c, 1.0 if c == fast else 2.0, **held[c == fast]) for c in candidates]

    best, _ = tune.tune(START, CASE.d, run, stages=("exact",), promised_mb=promised)
    assert best == (fast if wins else START)


def test_the_promise_is_a_quarter_of_optax_where_that_can_be():
    # 4NV = 384 MiB and 56.25 MiB of gradients; 250 MiB and 266 MiB.
    assert tune.promised_mb(cases.find("smollm2-135m", 2048)) == (384 + 56.25) / 4 - 56.25
    assert tune.promised_mb(cases.find("mistral-7b", 2048)) == np.inf


# On the device


@pytest.mark.parametrize("stage", tune.STAGES)
def test_what_is_timed_lowers_for_cuda(stage):
    function = tune.program(
        stage, tune.problem_of(SMALL), heuristic(SMALL.n, SMALL.d, SMALL.v, 132)
    )
    shapes = (SMALL.n, SMALL.d), (SMALL.v, SMALL.d)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((SMALL.n,), jnp.int32))
    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    outputs = len(jax.tree.leaves(lowered.out_info))
    assert outputs == (1 if stage == "forward" else 3)


def test_a_candidate_that_does_not_compile_is_a_trial(monkeypatch):
    def refuse(*_):
        raise ValueError("too many registers\nand a long dump")

    monkeypatch.setattr(tune, "program", refuse)
    bench = tune.Bench(random.make("flat", SMALL, "bfloat16"), seconds=0.1)
    failed = tune.Trial("forward", START, failure="ValueError: too many registers")
    assert bench("forward", [START]) == [failed]


def test_a_bench_times_measures_and_reads(monkeypatch):
    """With a loss that needs no GPU in the place of the kernels, and tiles that cannot be built."""
    other = dataclasses.replace(START, hot=1024)
    made = []

    def program(stage, problem, chosen):
        made.append(chosen)
        if chosen == other:
            raise ValueError("no room")

        def loss(hidden, head, labels):
            return jnp.mean(jnp.square(hidden @ head.T)).astype(jnp.float32)

        return loss if stage == "forward" else jax.value_and_grad(loss, argnums=(0, 1))

    monkeypatch.setattr(tune, "program", program)
    data = random.make("flat", SMALL, "bfloat16")
    bench = tune.Bench(data, seconds=0.05)
    done, failed = bench("sparse", [START, other])
    assert failed == tune.Trial("sparse", other, failure="ValueError: no room")
    assert done.failure is None
    assert done.time is not None
    assert done.ratio == done.time.p50_ms / done.matmul_ms > 0
    assert done.temporary_mb > 0
    z = data.hidden.astype(np.float64) @ data.head.astype(np.float64).T
    d_hidden = 2 / z.size * z @ data.head.astype(np.float64)
    np.testing.assert_allclose(done.results[0], np.square(z).mean(), rtol=0.02)
    np.testing.assert_allclose(done.results[1], np.linalg.norm(d_hidden), rtol=0.02)
    assert bench("sparse", [START])[0].results == done.results
    assert made.count(START) == 1


@pytest.mark.parametrize("wrong", [{"d": 72}, {"n": 8}, {"n": 100}, {"v": 1021}])
def test_shapes_that_would_be_padded_are_refused(wrong):
    case = dataclasses.replace(SMALL, **wrong)
    with pytest.raises(ValueError, match="would be padded"):
        tune.Bench(random.make("flat", case, "bfloat16"), seconds=0.1)


# What comes out


def filled(chip: str, case: cases.Case, chosen: Tiles) -> dict:
    """The table that a printed entry makes."""
    return eval("{" + tune.entry(chip, case, chosen) + "\n}", vars(hopper.tiles))


@pytest.mark.parametrize(
    ("chip", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H20", "H20"),
        ("another", "another"),
    ],
)
def test_an_entry_holds_the_stages_that_were_bettered(chip, key):
    best, _ = tune.tune(START, CASE.d, costs)
    assert filled(chip, CASE, best) == {
        (key, CASE.n, CASE.d, CASE.v, "bfloat16"): {
            "forward": best.forward,
            "sparse": best.sparse,
            "exact": best.exact,
        }
    }
    one = dataclasses.replace(START, sparse=best.sparse)
    assert [*filled(chip, CASE, one).values()] == [{"sparse": best.sparse}]
    assert filled(chip, CASE, START) == {}


def test_an_entry_is_what_the_backend_then_takes(monkeypatch):
    best, _ = tune.tune(START, CASE.d, costs)
    chip = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(hopper.choose, "TUNED", filled(chip, CASE, best))
    problem = dataclasses.replace(tune.problem_of(CASE), chip=chip)
    assert hopper.choose.tiles_for(problem) == best
    other = heuristic(CASE.n, CASE.d, 32_000, 132)
    assert hopper.choose.tiles_for(dataclasses.replace(problem, v=32_000)) == other
    assert hopper.choose.tiles_for(dataclasses.replace(problem, n=7000)).forward == best.forward
    fewer = heuristic(2048, CASE.d, CASE.v, 132)
    assert hopper.choose.tiles_for(dataclasses.replace(problem, n=2048)) == fewer
    half = dataclasses.replace(problem, hidden_dtype=np.dtype(np.float16))
    assert hopper.choose.tiles_for(half) == heuristic(CASE.n, CASE.d, CASE.v, 132)


@pytest.mark.parametrize("key", hopper.tuned.TUNED, ids=str)
def test_the_table_is_of_known_chips_sizes_and_stages(key):
    family, n, d, v, dtype = key
    parts = hopper.tuned.TUNED[key]
    assert family in hopper.choose.FAMILIES
    assert n == hopper.choose.nearest_power_of_two(n)
    assert dtype in ("bfloat16", "float16")
    assert {*parts} <= {*tune.STAGES}
    assert (d, v) in {(case.d, case.v) for case in cases.CASES.values()}


def test_the_table_shows_the_fastest_first_and_the_failed_last():
    wide, none = (
        dataclasses.replace(START, forward=dataclasses.replace(START.forward, steps=steps))
        for steps in (3, 2)
    )
    trials = [
        trial("forward", START, 1.25),
        tune.Trial("forward", none, failure="ValueError: no [room]"),
        trial("forward", wide, 1.125),
    ]
    out = io.StringIO()
    tune.show(CASE, trials, Console(file=out, width=150))
    title, header, *rows = out.getvalue().splitlines()
    assert title.split()[-1] == "forward"
    assert header.split()[:3] == ["steps", "p50", "ms"]  # the one field that differs
    assert [row.split() for row in rows] == [
        ["3", "11.25", "1.125", "100.0"],
        [str(START.forward.steps), "12.5", "1.250", "100.0", "to", "beat"],
        ["2", "–", "–", "–", "ValueError:", "no", "[room]"],
    ]


def test_without_a_hopper_gpu_one_line_and_exit_2(capsys, tmp_path: pathlib.Path):
    if hopper.BACKEND.refuses(tune.problem_of(CASE)) is None:
        pytest.skip("there is a Hopper GPU here")
    file = tmp_path / "out.json"
    assert tune.main(["--case", "gemma2-2b", "--json", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("benchmarks.tune: hopper needs an NVIDIA Hopper GPU")
    assert captured.err.count("\n") == 1
    assert not file.exists()


def test_an_unknown_case_is_named(capsys):
    assert tune.main(["--case", "gemma"]) == 2
    assert "no case 'gemma'; must be DxV or one of gemma2-2b" in capsys.readouterr().err


def test_wrong_flags_are_refused(capsys):
    assert tune.main(["--case", "gemma2-2b", "--memory", "0.5"]) == 2
    assert "--memory must be at least 1, what the first tiles take, not 0.5" in (
        capsys.readouterr().err
    )
    assert tune.main(["--case", "gemma2-2b", "--stage", "fused"]) == 2
    assert "'fused'" in capsys.readouterr().err


def test_a_whole_run_prints_entries_and_writes_every_trial(
    monkeypatch, capsys, tmp_path: pathlib.Path
):
    monkeypatch.setattr(type(hopper.BACKEND), "refuses", lambda self, problem: None)
    monkeypatch.setattr(tune.Bench, "__call__", lambda self, *it: costs(*it))
    monkeypatch.setitem(cases.CASES, "small", SMALL)
    file = tmp_path / "runs" / "tune.json"
    command = ["--case", "small", "--n", "128", "--json", str(file)]
    assert tune.main([*command, "--commit", "abc"]) == 0
    report = json.loads(file.read_text())
    assert report["commit"] == "abc"
    assert report["versions"]["jax"] == jax.__version__
    assert {"command", "gpu", "time", "inputs"} <= report.keys()
    (record,) = report["cases"]
    assert (record["n"], record["d"], record["v"]) == (128, 64, 512)
    trials = list(itertools.chain(*record["rounds"]))
    ratios = [t["time"]["p50_ms"] / t["matmul_ms"] for t in trials]
    assert len(ratios) > 20
    chip = jax.devices()[0].device_kind
    chip = hopper.choose.family(chip) or chip
    printed = capsys.readouterr().out
    ((key, parts),) = eval(
        "{" + printed[printed.rindex('    ("') :] + "}", vars(hopper.tiles)
    ).items()
    assert key == (chip, 128, 64, 512, "bfloat16")
    assert {name: dataclasses.asdict(part) for name, part in parts.items()} == {
        name: record["best"][name] for name in parts
    }
    usual = heuristic(128, 64, 512, hopper.streaming_multiprocessors())
    assert {*parts} == {
        name
        for name in tune.STAGES
        if record["best"][name] != dataclasses.asdict(getattr(usual, name))
    }
