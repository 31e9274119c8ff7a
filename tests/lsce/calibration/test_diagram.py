"""The reliability diagram: what is drawn, not how beautiful it is."""

import itertools
import subprocess
import sys
import time
from statistics import NormalDist

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.image import imread

from lsce.calibration import CalibrationState, reliability_diagram, wilson_interval


def samples(n=500, power=2.0, seed=0):
    r = np.random.default_rng(seed)
    confidence = (0.2 + 0.8 * r.random(n)).astype(np.float32)
    return confidence, r.random(n) < confidence**power


def texts(figure):
    return [t.get_text() for ax in figure.axes for t in (*ax.texts, ax.title, ax._left_title)]


def labels(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def test_it_shows_the_bins_and_the_numbers():
    confidence, correct = samples()
    result = CalibrationState.create(10).update(confidence, correct).compute()
    figure = reliability_diagram(confidence, correct, bins=10, title="Over-confident")
    accuracy, histogram = figure.axes

    (dots,) = (line for line in accuracy.lines if line.get_marker() == "o")
    seen = np.asarray(result.bin_count) > 0
    np.testing.assert_allclose(dots.get_xdata(), np.asarray(result.bin_confidence)[seen], atol=1e-6)
    np.testing.assert_allclose(dots.get_ydata(), np.asarray(result.bin_accuracy)[seen], atol=1e-6)
    gap = [bar for bar in accuracy.patches if bar.get_alpha()]
    shaded = sum(abs(bar.get_height()) for bar in gap)
    expected = abs(np.asarray(result.bin_confidence) - np.asarray(result.bin_accuracy)).sum()
    assert shaded == pytest.approx(expected, abs=1e-6)
    heights = [bar.get_height() for bar in histogram.patches]
    np.testing.assert_allclose(heights, np.asarray(result.bin_count) / 500, atol=1e-6)

    written = " ".join(texts(figure))
    assert f"ECE {float(result.ece):.4f}" in written
    assert f"accuracy {correct.mean():.4f}" in written
    assert "n 500" in written
    assert "Over-confident" in written
    assert "calibrated" in labels(accuracy)
    assert "gap, over-confident" in labels(accuracy)
    assert labels(histogram) == ["accuracy", "mean confidence"]


@pytest.mark.parametrize("confident", [False, True])
def test_the_histogram_s_legend_stands_where_few_samples_are(confident):
    confidence, correct = samples()
    figure = reliability_diagram(confidence * (1 if confident else 0.4), correct)
    figure.canvas.draw()
    ax = figure.axes[1]
    middle = ax.transAxes.inverted().transform(ax.get_legend().get_window_extent())[:, 0].mean()
    assert (middle < 0.5) == confident


def test_the_histogram_s_legend_hides_neither_line():
    confidence = np.tile(np.array([0.3, 0.5, 0.55, 0.6, 0.9], np.float32), (100, 1)).T
    correct = np.zeros(confidence.shape, bool)
    correct[1] = True  # accuracy 0.2, mean confidence 0.57
    figure = reliability_diagram(confidence, correct)
    figure.canvas.draw()
    ax = figure.axes[1]
    box = ax.transAxes.inverted().transform(ax.get_legend().get_window_extent())
    for line in ax.lines:
        assert not box[0, 0] <= line.get_xdata()[0] <= box[1, 0]


@pytest.mark.parametrize(("scale", "power"), [(1.0, 2.0), (0.4, 0.3)])
def test_no_dot_lies_under_the_legend(scale, power):
    confidence, _ = samples()
    confidence *= scale
    correct = np.random.default_rng(1).random(len(confidence)) < confidence**power
    figure = reliability_diagram(confidence, correct)
    figure.canvas.draw()
    ax = figure.axes[0]
    (dots,) = (line for line in ax.lines if line.get_marker() == "o")
    legend = ax.get_legend().get_window_extent()
    places = ax.transData.transform(np.stack(dots.get_data(), axis=1))
    assert len(places) > 4
    assert not any(legend.contains(x, y) for x, y in places)


@pytest.mark.parametrize("path", ["", "."])
def test_a_path_that_names_no_file_is_refused(path):
    with pytest.raises(ValueError, match=f"path='{path}' must name a file"):
        reliability_diagram(*samples(), path=path)


def test_a_machine_however_slow_draws_without_a_warning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", itertools.count(0.0, 10.0).__next__)
        reliability_diagram(*samples(), path=tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("confidence", "correct", "bins"),
    [
        (*samples(12), 15),
        (*samples(300), 1),
        (*samples(300, power=0.3), 15),
        (np.ones(50), np.ones(50), 15),
        (np.zeros(50), np.ones(50), 15),
        (np.array([0.7]), np.array([True]), 15),
        (np.zeros(0, np.float32), np.zeros(0, bool), 15),
    ],
    ids=["few", "one bin", "shy", "sure and right", "never sure", "one sample", "none"],
)
def test_odd_data_are_drawn_and_saved(tmp_path, confidence, correct, bins):
    path = tmp_path / "diagram.png"
    figure = reliability_diagram(confidence, correct, bins=bins, path=path)
    pixels = imread(path)
    assert pixels.shape[0] > pixels.shape[1] > 500
    assert pixels.std() > 0.05
    assert ("no samples" in texts(figure)) == (len(confidence) == 0)


def test_sides_of_the_gap_are_named_apart():
    over = reliability_diagram(np.full(40, 0.9), np.arange(40) % 2 == 0).axes[0]
    under = reliability_diagram(np.full(40, 0.2), np.arange(40) % 2 == 0).axes[0]
    assert "gap, over-confident" in labels(over)
    assert "gap, under-confident" not in labels(over)
    assert "gap, under-confident" in labels(under)


def test_a_state_is_drawn_as_its_samples_are():
    confidence, correct = samples()
    state = CalibrationState.create(12).update(confidence, correct)
    from_state, from_samples = (
        reliability_diagram(state),
        reliability_diagram(confidence, correct, bins=12),
    )
    assert texts(from_state) == texts(from_samples)
    assert len(from_state.axes[1].patches) == 12


def test_a_state_with_invalid_samples_says_so():
    import jax

    state = jax.jit(CalibrationState.update)(
        CalibrationState.create(5), np.array([0.5, np.nan]), np.array([1, 1])
    )
    assert any("1 invalid" in t for t in texts(reliability_diagram(state)))


def test_several_diagrams_share_a_figure(tmp_path):
    figure = Figure(figsize=(9, 6), layout="constrained")
    for ax, power in zip(figure.subplots(1, 2), (2.0, 1.0), strict=True):
        assert reliability_diagram(*samples(power=power), title=f"{power}", ax=ax) is figure
    assert len(figure.axes) == 4
    figure.savefig(tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_mistakes_are_named():
    confidence, correct = samples(10)
    with pytest.raises(ValueError, match="confidence must be a probability"):
        reliability_diagram(confidence + 1, correct)
    with pytest.raises(TypeError, match="correct is missing"):
        reliability_diagram(confidence)
    with pytest.raises(TypeError, match="correct must be left out"):
        reliability_diagram(CalibrationState.create(), correct)
    with pytest.raises(ValueError, match="part of a figure's grid"):
        reliability_diagram(confidence, correct, ax=Figure().add_axes((0, 0, 1, 1)))


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never():
    script = """
import sys
import numpy as np
from lsce.calibration import reliability_diagram
assert not any(name.startswith("matplotlib") for name in sys.modules)
reliability_diagram(np.array([0.5]), np.array([1]))
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    sys.modules[name] = None
try:
    reliability_diagram(np.array([0.5]), np.array([1]))
except ImportError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert 'pip install "lsce[plot]"' in ran.stdout


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 7), (500, 1000)])
def test_wilson_ends_are_where_the_score_test_just_rejects(successes, trials):
    z = NormalDist().inv_cdf(0.975)
    low, high = wilson_interval(successes, trials)
    p = successes / trials
    assert 0 <= low <= p <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(p - end) == pytest.approx(z * np.sqrt(end * (1 - end) / trials), rel=1e-9)
    assert wilson_interval(0, 0) == (0, 1)
    narrow = wilson_interval(successes, trials, level=0.5)
    assert narrow[1] - narrow[0] < high - low
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 1"):
        wilson_interval(1, 2, level=1)


@pytest.mark.parametrize(
    ("successes", "trials", "message"),
    [
        (11, 10, r"successes must lie between 0 and trials, got 11"),
        (-1, 10, "successes must lie between 0 and trials, got -1"),
        ([1, np.nan], 10, r"got nan at \[1\]"),
        (1, -1, "trials must be finite and at least 0, got -1"),
        (1, np.inf, "trials must be finite"),
    ],
)
def test_impossible_counts_have_no_wilson_interval(successes, trials, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, trials)


def test_wilson_intervals_of_many_proportions():
    low, high = wilson_interval([[0, 3], [5, 10]], 10)
    assert low.shape == high.shape == (2, 2)
    assert (low[1, 0], high[1, 0]) == wilson_interval(5, 10)
