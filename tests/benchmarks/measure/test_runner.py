"""The benchmarks measure what they say: shapes, inputs, timer, memory, errors, rows, refusals."""

import dataclasses
import functools
import io
import json
import pathlib
import subprocess
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import on_devices
import pytest
from paths import ROOT
from rich.console import Console

from benchmarks import cases, errors, inputs, loss, memory, report, runner, table, timing
from benchmarks.jax_framework import JaxFramework
from benchmarks.jax_losses import LOSSES
from benchmarks.settings import Run, Settings, gradient_filter, run_from_json, unsupported

SMALL = cases.Case("small", 33, 24, 201)


@pytest.fixture
def small() -> inputs.Inputs:
    return inputs.make("peaked", SMALL, "float32")


# Cases


def test_a_case_is_found_by_name_and_takes_another_n():
    assert cases.find("gemma2-2b") == cases.Case("gemma2-2b", 8192, 2304, 256_000)
    assert cases.find("llama3-8b", 2048) == cases.Case("llama3-8b", 2048, 4096, 128_256)


def test_every_named_model_of_the_readme_is_a_case():
    named = "gemma2-2b gemma3-270m llama3.2-1b llama3-8b mistral-7b qwen2.5-7b smollm2-135m tiny"
    assert list(cases.CASES) == named.split()


def test_a_wrong_case_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'gemma'; must be one of gemma2-2b, .*, tiny"):
        cases.find("gemma")
    with pytest.raises(ValueError, match="N=0"):
        cases.find("tiny", 0)


# Inputs


def test_inputs_repeat_and_differ_by_seed():
    first, again, other = (inputs.make("flat", SMALL, "float32", seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.hidden, again.hidden)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert np.any(first.hidden != other.hidden)


def probabilities(data: inputs.Inputs) -> np.ndarray:
    z = data.hidden.astype(np.float64) @ data.head.astype(np.float64).T
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_flat_logits_have_unit_spread_and_no_class_stands_out():
    data = inputs.make("flat", cases.Case("", 64, 128, 4096), "float32")
    z = data.hidden @ data.head.T
    assert 0.9 < z.std() < 1.1
    assert probabilities(data).max() < 0.05


def test_peaked_labels_take_most_of_the_probability_and_repeat():
    data = inputs.make("peaked", cases.Case("", 256, 128, 4096), "float32")
    p = probabilities(data)
    assert p[np.arange(256), data.labels].mean() > 0.5
    assert (p > 2**-12).mean() < 0.25
    assert np.bincount(data.labels).max() > 10  # uniform labels would hardly repeat


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_gives_back_the_same_bits(tmp_path: pathlib.Path, dtype: str):
    data = inputs.make("peaked", SMALL, dtype)
    inputs.save(data, tmp_path / "x.npz")
    loaded = inputs.load(tmp_path / "x.npz")
    assert loaded.kind == "peaked"
    for name in ("hidden", "head", "labels"):
        before, after = getattr(data, name), getattr(loaded, name)
        assert before.dtype == after.dtype
        assert before.tobytes() == after.tobytes()


def test_a_plain_file_is_cast_cut_and_named_after_itself(tmp_path: pathlib.Path):
    data = inputs.make("flat", cases.CASES["tiny"], "float32")
    path = tmp_path / "mine.npz"
    np.savez(path, hidden=data.hidden, head=data.head, labels=data.labels.astype(np.int64))
    loaded = inputs.of(str(path), cases.find("tiny", 5), "bfloat16")
    assert loaded.kind == "mine"
    assert loaded.hidden.shape == (5, 72)
    assert loaded.hidden.dtype.name == "bfloat16"
    assert loaded.labels.dtype == np.int32


def test_wrong_inputs_are_refused_with_what_would_be_right(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"'spiky'; must be one of flat, peaked, an \.npz file"):
        inputs.of("spiky", SMALL, "float32")
    with pytest.raises(ValueError, match="'int8'; must be one of bfloat16, float32"):
        inputs.make("flat", SMALL, "int8")
    np.savez(tmp_path / "x.npz", hidden=np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="no array named head, labels"):
        inputs.load(tmp_path / "x.npz")
    zeros = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
        inputs.Inputs("x", zeros, zeros, np.array([0, 1, 3], np.int32))
    with pytest.raises(ValueError, match="do not fit"):
        inputs.Inputs("x", zeros, zeros[:, :2], np.array([0, 1, 2], np.int32))
    inputs.save(inputs.make("flat", SMALL, "float32"), tmp_path / "small.npz")
    for other in (cases.CASES["tiny"], dataclasses.replace(SMALL, n=34)):
        with pytest.raises(ValueError, match=r"holds flat .*33, 24, 201\), too little or not of"):
            inputs.of(str(tmp_path / "small.npz"), other, "float32")


# Timer


def test_a_short_call_is_launched_many_times_between_waits(monkeypatch: pytest.MonkeyPatch):
    clock = 0.0
    waits = []

    def call() -> str:
        nonlocal clock
        clock += 0.004
        return "result"

    def wait(result: str) -> None:
        nonlocal clock
        clock += 0.001
        waits.append(result)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    [measured] = timing.beside([call], wait, warmup=2, seconds=1.0)
    # A first sample of 5 ms: 20 launches make 100 ms, and ten such samples make a second.
    assert measured.launches == 20
    assert measured.samples == 10
    assert measured.p50_ms == pytest.approx(4.05)
    assert measured.p20_ms == pytest.approx(measured.p80_ms)
    assert waits == ["result"] * (2 + 1 + 1 + 10)


def test_a_slow_call_is_sampled_at_least_five_times(monkeypatch: pytest.MonkeyPatch):
    # Two more that are not counted: one to see how long it takes, one to warm up.
    durations = iter([1.0] * 3 + [1.0, 9.0] + [1.0, 2.0, 3.0, 4.0, 5.0])
    clock = 0.0

    def call() -> None:
        nonlocal clock
        clock += next(durations)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    [measured] = timing.beside([call], lambda result: None, warmup=3, seconds=1.0)
    assert (measured.samples, measured.launches) == (5, 1)
    assert (measured.p20_ms, measured.p50_ms, measured.p80_ms) == (1800, 3000, 4200)


def test_the_timer_wants_a_warm_up():
    with pytest.raises(ValueError, match="warmup=0"):
        timing.beside([lambda: None], lambda result: None, warmup=0)


def test_calls_beside_each_other_take_turns(monkeypatch: pytest.MonkeyPatch):
    clock, turns = 0.0, []

    def call(name: str, duration: float) -> None:
        nonlocal clock
        clock += duration
        turns.append(name)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    calls = functools.partial(call, "a", 0.02), functools.partial(call, "b", 0.05)
    a, b = timing.beside(calls, lambda result: None, warmup=1, seconds=0.5)
    assert (a.launches, a.samples, b.launches, b.samples) == (5, 5, 2, 5)
    assert (a.p50_ms, b.p50_ms) == pytest.approx((20, 50))
    assert "".join(turns[:4]) == "abab"  # the warm-up, and to see how long one takes
    rest = "".join(turns[4:])
    orders = [rest[i : i + 7] for i in range(0, len(rest), 7)]
    assert len(orders) == 1 + 5
    assert {*orders} == {"aaaaabb", "bbaaaaa"}
    # Every second order is the one before backwards.
    assert all(orders[i] != orders[i + 1] for i in range(0, len(orders), 2))


def test_the_product_is_timed_and_counted():
    product = timing.product(jnp.ones((8, 4)), jnp.ones((16, 4)))
    np.testing.assert_array_equal(product(), np.full((8, 16), 4.0))
    [measured] = timing.beside([product], seconds=0.01)
    assert 0 < measured.p20_ms <= measured.p50_ms <= measured.p80_ms
    # Two operations for each of N·D·V multiplications.
    assert timing.tflops(1000, 1000, 1000, 1.0) == pytest.approx(2.0)
    assert timing.tflops(1000, 1000, 1000, 1.0, products=3) == pytest.approx(6.0)


# Memory


def test_extra_memory_counts_outputs_and_temporaries_but_no_arguments():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: (x @ x) @ x).lower(x).compile()
    extra = memory.extra_memory(compiled)
    assert extra.output == x.nbytes
    assert extra.temporary >= x.nbytes  # the first product
    assert extra.mb == pytest.approx((extra.output + extra.temporary) / 2**20)


def test_extra_memory_leaves_out_what_is_written_into_donated_arguments():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert memory.extra_memory(compiled).output == 0


# Errors


def test_relative_error_is_zero_for_the_same_and_one_for_zeros():
    reference = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32)
    assert errors.relative_error(reference, reference) == 0
    assert errors.relative_error(np.zeros_like(reference), reference) == pytest.approx(1)
    assert errors.relative_error(reference * 1.01, reference) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_exact_gradients_are_those_of_float64(small: inputs.Inputs, softcap: float | None):
    beta = 0.1
    exact = errors.exact_gradients(small, beta, softcap)
    e, c = (x.astype(np.float64) for x in (small.hidden, small.head))
    raw = e @ c.T
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    dz = p - beta / SMALL.v
    dz[np.arange(SMALL.n), small.labels] -= 1 - beta
    if softcap is not None:
        dz *= 1 - (z / softcap) ** 2
    assert errors.relative_error(exact.hidden, dz @ c / SMALL.n) < 1e-5
    assert errors.relative_error(exact.head, dz.T @ e / SMALL.n) < 1e-5
    # The comparison would notice the smoothing term left out.
    unsmoothed = errors.exact_gradients(small, 0.0, softcap)
    assert errors.relative_error(unsmoothed.hidden, dz @ c / SMALL.n) > 1e-3


def test_a_reference_is_kept_for_the_next_process(tmp_path: pathlib.Path, small: inputs.Inputs):
    nobody = errors.Reference(tmp_path, small, compute=False)
    assert nobody(Settings()) is None
    first = errors.Reference(tmp_path, small, compute=True)(Settings(label_smoothing=0.1))
    later = errors.Reference(tmp_path, small, compute=False)(Settings(label_smoothing=0.1))
    assert first is not None
    assert later is not None
    np.testing.assert_array_equal(first.head, later.head)


# Runs and rows


def test_all_implementations_compute_the_same_loss_and_gradients(small: inputs.Inputs):
    names = ("auto", "chunked", "reference", "naive")
    runs = [Run(name, "fwdbwd", Settings(label_smoothing=0.1, softcap=5.0)) for name in names]
    runs.append(Run("naive", "fwd"))
    runs.append(Run("naive-integer", "fwd"))
    reference = functools.partial(errors.exact_gradients, small)
    measured = runner.measure_runs(
        JaxFramework(small),
        small,
        "small",
        runs,
        seconds=0.01,
        commit="abc",
        reference=lambda settings: reference(settings.label_smoothing, settings.softcap),
    )
    assert not measured.skipped
    *smoothed, one_hot, integer = measured.rows
    z = small.hidden.astype(np.float64) @ small.head.astype(np.float64).T
    capped = 5 * np.tanh(z / 5)
    lse = np.log(np.exp(capped).sum(1))
    target = capped[np.arange(SMALL.n), small.labels]
    expected = np.mean(lse - 0.9 * target - 0.1 * capped.mean(1))
    for row in smoothed:
        assert row.loss == pytest.approx(expected, rel=1e-5)
        assert row.hidden_error is not None
        assert row.head_error is not None
        assert max(row.hidden_error, row.head_error) < 1e-5
        assert row.output_mb == pytest.approx(4 * (24 * (33 + 201) + 1) / 2**20, rel=1e-2)
    assert one_hot.loss == pytest.approx(integer.loss, rel=1e-6)
    assert one_hot.hidden_error is None


def test_a_row_explains_itself(small: inputs.Inputs):
    run = Run("auto", "fwdbwd", Settings(label_smoothing=0.1, stats=True, vocab_order=True))
    row = measured(small, run).rows[0]
    assert row.backend in LOSSES
    assert row.backend != "auto"
    assert (row.case, row.n, row.d, row.v, row.dtype) == ("small", 33, 24, 201, "float32")
    assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
    assert row.tflops == pytest.approx(3 * 2 * 33 * 24 * 201 / row.p50_ms / 1e9)
    assert row.matmul_ratio == pytest.approx(row.p50_ms / row.matmul_ms)
    assert row.matmul_share == pytest.approx(3 / row.matmul_ratio)
    assert row.extra_mb == pytest.approx((row.temporary_mb or 0) + (row.output_mb or 0))
    assert jax.__version__ in row.framework
    assert row.device
    assert row.commit == "abc"


def measured(data: inputs.Inputs, *runs: Run) -> report.Report:
    framework = JaxFramework(data)
    return runner.measure_runs(framework, data, "small", runs, seconds=0.01, commit="abc")


def test_what_cannot_run_is_skipped_with_a_reason_and_the_rest_goes_on(small: inputs.Inputs):
    smoothed = Settings(label_smoothing=0.1)
    outcome = measured(
        small,
        Run("naive-integer", "fwd", smoothed),
        Run("jax-cce", "fwd", smoothed),
        Run("naive", "fwd", Settings(stats=True)),
        Run("auto", "fwd", Settings(gradient_filter="most")),
        Run("naive", "fwd", smoothed),
    )
    assert [row.run.implementation for row in outcome.rows] == ["naive"]
    reasons = [skipped.reason for skipped in outcome.skipped]
    assert reasons[:3] == ["has no smoothing", "has no smoothing", "has no statistics"]
    assert "most" in reasons[3]


def test_an_absent_peer_is_skipped_by_name(small: inputs.Inputs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "jax_cce", None)
    (skipped,) = measured(small, Run("jax-cce", "fwd")).skipped
    assert "jax_cce" in skipped.reason


def test_a_peer_from_a_checkout_has_a_row_all_the_same(
    small: inputs.Inputs, monkeypatch: pytest.MonkeyPatch
):
    odd = dataclasses.replace(LOSSES["naive"], package="no-distribution-of-this-name")
    monkeypatch.setitem(LOSSES, "naive", odd)
    first, second = measured(small, Run("naive", "fwd"), Run("reference", "fwd")).rows
    assert first.framework.endswith("no-distribution-of-this-name of unknown version")
    assert "unknown" not in second.framework


def test_a_row_survives_a_reference_that_does_not_fit(small: inputs.Inputs):
    def too_large(settings: Settings):
        raise MemoryError("out of memory")

    said = []
    outcome = runner.measure_runs(
        JaxFramework(small),
        small,
        "small",
        [Run("naive", "fwdbwd")],
        seconds=0.01,
        commit="abc",
        reference=too_large,
        announce=said.append,
    )
    assert outcome.rows[0].hidden_error is None
    assert said[-1] == "no errors of naive: MemoryError: out of memory"


def test_an_unknown_implementation_is_refused_before_anything_runs(small: inputs.Inputs):
    with pytest.raises(ValueError, match=r"'fast'; must be one of auto, .*naive"):
        measured(small, Run("naive", "fwd"), Run("fast", "fwd"))


def test_refusals_name_every_missing_option():
    everything = Settings(0.1, 30.0, "fused", True, True)
    assert unsupported(everything, ("smoothing", "softcap")) == (
        "has no filter and no vocabulary order and no statistics"
    )
    assert unsupported(Settings(gradient_filter=None), ()) == "has no exact"
    assert unsupported(Settings(gradient_filter=None), ("exact",)) is None
    assert unsupported(Settings(gradient_filter=0.1), ("filter",)) is None
    assert unsupported(Settings(), ()) is None


def test_a_report_survives_its_file(tmp_path: pathlib.Path, small: inputs.Inputs):
    exact, smoothed = Settings(gradient_filter=None), Settings(0.1)
    outcome = measured(small, Run("auto", "fwd", exact), Run("naive-integer", "fwd", smoothed))
    assert len(outcome.rows) == len(outcome.skipped) == 1
    path = tmp_path / "folder" / "report.json"
    report.write(outcome, path)
    assert report.read(path) == outcome
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a benchmark report"):
        report.read(path)


def test_a_run_survives_json():
    run = Run("auto", "fwd", Settings(0.1, 30.0, None, True, True))
    assert run_from_json(json.loads(json.dumps(dataclasses.asdict(run)))) == run
    with pytest.raises(ValueError, match="mode='bwd'; must be one of fwd, fwdbwd"):
        Run("auto", "bwd")  # pyright: ignore[reportArgumentType]


def test_the_table_shows_rows_and_reasons(small: inputs.Inputs):
    smoothed = Settings(label_smoothing=0.1, gradient_filter=None)
    outcome = measured(small, Run("auto", "fwd", smoothed), Run("naive-integer", "fwd", smoothed))
    out = io.StringIO()
    report.show(outcome, Console(file=out))
    text = out.getvalue()
    assert "N, D, V = 33, 24, 201" in text
    assert f"auto → {outcome.rows[0].backend}" in text
    assert "β=0.1 filter=exact" in text
    assert "skipped naive-integer: has no smoothing" in text


# The command line


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("fused", "fused"), ("none", None), ("1e-4", 1e-4)]
)
def test_gradient_filters_are_read(text: str, value: object):
    assert gradient_filter(text) == value


def test_one_command_measures_the_whole_grid(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "rows.json"
    command = "--n 8 16 --implementation chunked naive --mode fwdbwd --label-smoothing 0 0.1"
    assert loss.main([*command.split(), "--errors", "--seconds", "0.01", "--json", str(path)]) == 0
    outcome = report.read(path)
    grid = {(row.n, row.run) for row in outcome.rows}
    assert len(grid) == len(outcome.rows) == 8
    assert {row.n for row in outcome.rows} == {8, 16}
    assert all(row.head_error is not None and row.head_error < 1e-5 for row in outcome.rows)
    assert "bare matmul" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--case huge", "no case 'huge'; must be one of gemma2-2b"),
        ("--implementation fast", "no implementation 'fast'; must be any of auto"),
        ("--mode bwd", "must be one of fwd, fwdbwd"),
        ("--gradient-filter some", "must be auto, none (exact), fused or a number"),
        ("--inputs spiky", "must be one of flat, peaked"),
        ("--inputs absent.npz", "absent.npz"),
        ("--dtype int8", "must be one of bfloat16, float32"),
        ("--label-smoothing 0 2", "label smoothing must be in [0, 1], not 2.0"),
        ("--label-smoothing nan", "label smoothing must be in [0, 1], not nan"),
        ("--softcap 0", "softcap must be finite and above 0, not 0.0"),
        ("--gradient-filter 1", "gradient filter must be in [0, 1), not 1.0"),
        ("--devices 1000", "1000 devices asked for; this machine has"),
    ],
)
def test_a_wrong_flag_is_named_with_the_valid_values(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert loss.main(flags.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--json .", "argument --json: '.' is a folder: name a file"),
        ("--json FILE/rows.json", "which is a file"),
        ("--n 0", "argument --n: 0 must be at least 1"),
        ("--seed -1", "argument --seed: -1 must be at least 0"),
        ("--seconds inf", "argument --seconds: inf must be finite and above 0"),
    ],
)
@pytest.mark.parametrize("main", [loss.main, table.main], ids=["loss", "table"])
def test_a_value_that_no_module_takes_is_refused_before_anything_is_measured(
    main: Callable[[list[str]], int],
    flags: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(flags.replace("FILE", str(tmp_path / "file")).split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_numpy_s_is_named(tmp_path: pathlib.Path):
    for name in ("x.npz", "hidden.npy"):
        (tmp_path / name).write_text("no array")
        path = tmp_path / name if name.endswith("z") else tmp_path
        with pytest.raises(ValueError, match=rf"{name} is not a file of NumPy arrays"):
            inputs.of(str(path), SMALL, "float32")


def test_devices_share_the_tokens():
    """The gradients are the same as of one device, and each needs a share of the memory."""
    printed = on_devices.run(
        2,
        """
        import dataclasses
        from benchmarks import cases, errors, inputs, runner
        from benchmarks.jax_framework import JaxFramework, check_devices
        from benchmarks.settings import Run, Settings

        case = cases.Case("small", 512, 24, 201)
        data = inputs.make("peaked", case, "float32")
        run = Run("naive", "fwdbwd", Settings(label_smoothing=0.1))
        exact = errors.Reference(None, data, compute=True)
        for count in (1, 2):
            framework = JaxFramework(data, count)
            [row] = runner.measure_runs(
                framework, data, "small", [run], seconds=0.01, commit="abc", reference=exact
            ).rows
            assert len(framework.product().addressable_shards) == count
            for error in (row.hidden_error, row.head_error):
                assert 0 < error < 1e-5
            memory = row.temporary_mb if count == 1 else memory / row.temporary_mb
        assert row.device.startswith("2 × CPU")
        assert memory > 1.5
        try:
            check_devices(2, 63)
        except ValueError as error:
            print(error)
        """,
    )
    assert printed == "63 tokens cannot be split evenly over 2 devices"


def test_a_run_without_any_row_fails(capsys: pytest.CaptureFixture[str]):
    command = "--implementation naive-integer --mode fwd --label-smoothing 0.1"
    assert loss.main(command.split()) == 1
    assert "has no smoothing" in capsys.readouterr().out


def test_the_commit_is_git_s():
    root = ROOT
    git = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    expected = git.stdout.strip() if git.returncode == 0 else "unknown"
    assert runner.current_commit().removesuffix("-dirty") == expected
