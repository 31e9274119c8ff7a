"""What is said of results is what their files hold, and each file is accounted for."""

import json
import re

import pytest
from hopper_on_cpu import problem
from paths import ROOT

from benchmarks.implementations.settings import Run, Settings
from benchmarks.inputs import cases
from benchmarks.measure import report
from benchmarks.measure.report import Row
from benchmarks.steps.memory import StepMemory
from benchmarks.train_step import from_json
from benchmarks.whole_run import Found
from lsce.sparse import filter as filtering

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
NOTES = (ROOT / "benchmarks" / "NOTES.md").read_text()
SMOOTHED = Settings(label_smoothing=0.1)
EXACT, FUSED, FP8 = (
    Settings(label_smoothing=0.1, gradient_filter=it) for it in (None, "fused", "fp8")
)
SMOOTHED_RUN, FP8_RUN = Run("auto", "fwdbwd", SMOOTHED), Run("auto", "fwdbwd", FP8)
PLAIN = Settings()
LINES = {
    "**lsce**": ("gemma2-2b", SMOOTHED_RUN),
    'lsce, `gradient_filter="fp8"`: drops nothing': ("gemma2-2b", FP8_RUN),
    "lsce by default again": ("table-peaked", SMOOTHED_RUN),
    "optax again": ("table-peaked", Run("naive", "fwdbwd", SMOOTHED)),
    '*without smoothing:* lsce, `gradient_filter="fp8"`': (
        "table-peaked",
        Run("auto", "fwdbwd", Settings(gradient_filter="fp8")),
    ),
    "optax on materialised logits": ("gemma2-2b", Run("naive", "fwdbwd", SMOOTHED)),
    'lsce, `gradient_filter="fp8"` again': ("table-peaked", FP8_RUN),
    'lsce, `gradient_filter="fused"`': ("table-peaked", Run("auto", "fwdbwd", FUSED)),
    "lsce, `gradient_filter=None`": ("table-peaked", Run("auto", "fwdbwd", EXACT)),
    "torch.compile": ("table-peaked", Run("torch-compile", "fwdbwd", SMOOTHED)),
    "Liger, its Triton kernels, in larger chunks": (
        "table-peaked",
        Run("liger-chunks", "fwdbwd", SMOOTHED),
    ),
    "flash-linear-attention, dC in bfloat16": (
        "table-peaked",
        Run("fla-bfloat16", "fwdbwd", SMOOTHED),
    ),
    "QuACK, without smoothing": ("table-peaked", Run("quack", "fwdbwd", PLAIN)),
}


def row(name: str, run: Run, case: tuple[str, int] = ("gemma2-2b", 8192)) -> Row:
    (found,) = (
        row
        for row in report.read(RESULTS / f"{name}.json").rows
        if row.run == run and (row.case, row.n) == case
    )
    return found


def sizes(case: str) -> dict[str, int]:
    return {"d": cases.CASES[case].d, "v": cases.CASES[case].v}


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def test_every_file_has_its_command():
    said = (RESULTS / "README.md").read_text()
    for path in RESULTS.iterdir():
        patterns = re.findall(r"`([\w.*{},-]+\.(?:json|txt|png))`", said)
        names = [
            pattern.replace(choice, one).strip("{}")
            for pattern in patterns
            for choice in re.findall(r"\{.*\}", pattern) or [pattern]
            for one in choice.strip("{}").split(",")
        ]
        assert path.name == "README.md" or any(path.match(name) for name in names), path.name


def test_the_notes_name_files_that_exist():
    names = set(re.findall(r"`(h[12]00-[\w.-]+)`", NOTES))
    assert len(names) > 4
    for name in names:
        assert (RESULTS / f"{name}.json").is_file(), name


def test_every_report_can_be_read():
    for path in RESULTS.glob("h?00-*.json"):
        if "-train-step" in path.name:
            assert [from_json(row) for row in json.loads(path.read_text())], path.name
        elif "-step-memory" in path.name:
            assert [StepMemory(**row["found"]) for row in json.loads(path.read_text())], path.name
        elif "-whole-run" in path.name:
            assert not Found(**json.loads(path.read_text())).failed, path.name
        elif "-tune-" not in path.name:
            assert report.read(path).rows, path.name


def test_a_file_is_named_after_its_device():
    """So that no row of one chip is read beside those of another."""
    paths = list(RESULTS.glob("h?00-*.json"))
    assert len(paths) > 10
    for path in paths:
        devices = set(re.findall(r'"(?:device|gpu)": "(.*)"', path.read_text()))
        assert devices, path.name
        assert all(path.name[:4].upper() in device for device in devices), path.name


@pytest.mark.parametrize("title", LINES)
def test_a_line_of_the_readme_is_a_measured_row(title: str):
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {title} |"))
    memory, time, ratio, errors = (cell.strip() for cell in line.split("|")[2:-1])
    name, run = LINES[title]
    found = row(f"h200-{name}", run)
    assert found.extra_mb is not None
    assert numbers(memory) == [round(found.extra_mb)]
    assert numbers(time) == pytest.approx([found.p50_ms], abs=0.06)
    assert numbers(ratio) == pytest.approx([found.matmul_ratio], abs=0.006)
    measured = [x for x in (found.hidden_error, found.head_error) if x is not None]
    assert numbers(errors) == pytest.approx(measured, rel=0.05)


def test_other_figures_of_the_readme_are_measured():
    text = " ".join(README.split())
    exact = row("h200-like", Run("auto", "fwdbwd", EXACT))
    peaked = {
        (mode, choice, order, low): row("h200-table-peaked", Run("auto", mode, settings))
        for mode in ("fwd", "fwdbwd")
        for choice, order, low in (
            ("auto", False, None),
            ("auto", True, None),
            ("auto", False, "fp8"),
        )
        for settings in (
            Settings(label_smoothing=0.1, gradient_filter=choice, vocab_order=order, precision=low),
        )
    }
    alone, low = (peaked["fwd", "auto", False, it].matmul_ratio for it in (None, "fp8"))
    usual, ordered = (peaked["fwdbwd", "auto", it, None] for it in (False, True))
    flat = [
        row("h100-table-flat", Run(name, "fwdbwd", settings)).matmul_ratio
        for name, settings in (
            ("auto", SMOOTHED), ("auto", EXACT), ("auto", FUSED), ("naive", SMOOTHED)
        )
    ]  # fmt: skip
    filtered = json.loads((RESULTS / "cpu-filter-default.json").read_text())
    rare, before, _, _, other, other_before, _, _ = filtered
    assert [(row["inputs"], row["n"]) for row in (rare, before, other, other_before)] == [
        *[("smollm2-135m", 2048)] * 2,
        *[("gemma3-270m", 2048)] * 2,
    ]

    def parts(which: str) -> str:
        """Of the default's errors, from the least to the greatest."""
        found = [row[which] for row in filtered[::2]]
        return f"{min(found):.4f} to {max(found):.4f}".replace("0.", ".")

    everywhere = report.read(RESULTS / "h200-everywhere.json").rows
    times = {(row.case, row.n, row.run.implementation): row.p50_ms for row in everywhere}
    faster = [
        time / times[case, n, "auto"] for (case, n, name), time in times.items() if name == "naive"
    ]
    assert len(faster) == 21
    pairs = report.read(RESULTS / "h100-devices.json").rows

    times = {
        (row.case, row.n, row.run.implementation): row.p50_ms
        for row in report.read(RESULTS / "h200-everywhere-fp8.json").rows
    }
    of_fp8 = {
        (case, n): time / times[case, n, "auto"]
        for (case, n, name), time in times.items()
        if name == "naive"
    }
    narrow, (few_tokens, *few_classes) = (
        [x for (case, _), x in of_fp8.items() if case == wanted]
        for wanted in ("smollm2-135m", "mistral-7b")
    )
    others = {at: x for at, x in of_fp8.items() if at[0] not in ("smollm2-135m", "mistral-7b")}
    many = [x for (_, n), x in others.items() if n > 2048]
    within_dc = [x for (case, n), x in others.items() if n == 2048 and case != "gemma3-270m"]
    assert tuple(map(len, (narrow, few_classes, many, within_dc))) == (3, 2, 10, 4)
    low_and_not = [
        {
            (row.case, row.n): row.p50_ms
            for row in report.read(RESULTS / f"{name}.json").rows
            if row.run.implementation == "auto"
        }
        for name in ("h200-everywhere-precision", "h200-everywhere")
    ]
    by_low = [
        usual / low_and_not[0][case, n]
        for (case, n), usual in low_and_not[1].items()
        if filtering.low_forward_worthwhile(problem(n=n, **sizes(case)))
    ]
    assert len(by_low) == 13
    split = next(
        row
        for row in map(from_json, json.loads((RESULTS / "h200-x2-train-step.json").read_text()))
        if row.model == "gemma2-2b" and row.variant.rows == 32
    )
    assert split.measured is not None
    two, one = (
        next(row.p50_ms for row in pairs if row.n == n and row.run.settings == SMOOTHED)
        for n in (16384, 8192)
    )
    h200 = {
        (kind, row.run.implementation, row.run.settings.gradient_filter): row.matmul_ratio
        for kind in ("flat", "like")
        for row in report.read(RESULTS / f"h200-{kind}.json").rows
    }
    fp8 = {
        (kind, row.run.implementation, row.run.settings.gradient_filter): row.matmul_ratio or 0.0
        for kind in ("flat", "like")
        for row in report.read(RESULTS / f"h200-fp8-{kind}.json").rows
    }
    of_flat = (
        row("h200-flat-cases", Run(name, "fwdbwd", SMOOTHED)).matmul_ratio
        for name in ("auto", "naive")
    )
    in_8_bits = {f"{fp8[kind, 'auto', 'fp8']:.1f}" for kind in ("flat", "like")}
    memory = {
        row["mesh"]: row for row in json.loads((RESULTS / "h100-step-memory.json").read_text())
    }
    share = memory["data=1,fsdp=2"]["found"]
    for said in (
        f"{share['state'] / 1e9:.1f} GB of weights and moments on each of two H100s",
        f"{share['peak'] / 1e9:.1f} GB in all",
        f"32 rows take {split.measured.peak_gb:.1f} GB on each,"
        f" {split.tokens_per_s:,.0f} tokens/s and {split.mfu:.1%} MFU",
        f"classes or more it is {min(many):.2f} to {max(many):.2f} times as fast as optax",
        f"2,048 tokens {min(within_dc):.2f} to {max(within_dc):.2f} times as fast",
        f"D = 576 it is {min(narrow):.2f} to {max(narrow):.2f} times as fast, with 32,000 classes"
        f" {min(few_classes):.2f} to {max(few_classes):.2f} times from 8,192 tokens on, and"
        f" {few_tokens:.2f} times with 2,048",
        f"{exact.p50_ms:.1f} ms and {exact.extra_mb:,.0f} MiB",
        f"took {usual.p50_ms:.1f} ms and the vocabulary by mean logit {ordered.p50_ms:.1f}, with a"
        f" dE error of {ordered.hidden_error:.3f} instead of {usual.hidden_error:.3f}".replace(
            "0.", "."
        ),
        f"At five heads it is {min(by_low):.2f} to {max(by_low):.2f} times as fast as the default",
        f"the loss alone in {low:.2f} products where the default took {alone:.2f}".replace(
            "0.", "."
        ),
        'an H100 took {:.2f} products, None {:.2f}, "fused" {:.2f}, optax {:.2f}'.format(*flat),
        "head takes {:.2f} products, where optax takes {:.2f}".format(*of_flat),
        f"from 8-bit operands, for {' to '.join(sorted(in_8_bits))} products",
        f"exact: {h200['like', 'auto', 'hidden']:.1f} products,"
        f" None takes {h200['like', 'auto', None]:.1f}",
        f"SmolLM2 135M {rare['rows_left_out']:.0%} of the rows of dC,"
        f" {rare['rows_norm'] * 100:.1f}% of ‖dC‖, ".replace(" 0.", " ."),
        f"off by {rare['rows_error']:.0%}, of Gemma 3 270M {other['rows_left_out']:.0%} of them by"
        f" {other['rows_error']:.0%}; with a larger ε, which the default had, by"
        f" {before['rows_error']:.0%} and {other_before['rows_error']:.0%}",
        f"error of {parts('hidden_error')} in dE and of {parts('head_error')} in dC",
        f"{min(faster):.2f} ({min(faster):.3f}) to".replace("(0.", "(.")
        + f" {max(faster):.2f} times as fast as optax",
        f"16,384 tokens took {two:.1f} ms where one took {one:.1f}",
    ):
        assert said in text


def test_peers_of_the_readme_are_measured():
    def of(name: str, settings: Settings = PLAIN) -> Row:
        return row("h200-table-peaked", Run(name, "fwdbwd", settings))

    at_once, again, cce = of("liger-flce"), of("liger-flsce"), of("cut-cross-entropy")
    usual, low = (
        row("h200-gemma2-2b", Run("auto", "fwdbwd", settings))
        for settings in (SMOOTHED, Settings(label_smoothing=0.1, precision="fp8"))
    )
    products = [row(f"h200-{name}", run).matmul_ms for name, run in LINES.values()]
    text = " ".join(README.split())
    for said in (
        f"{min(products):.1f} to {max(products):.1f} ms, timed in turn",
        f"Hopper take {at_once.p50_ms:.1f} ms (FLCE, {at_once.extra_mb:,.0f} MiB)"
        f" and {again.p50_ms:.1f} ms (FLSCE, {again.extra_mb:,.0f} MiB),"
        f" cut-cross-entropy {cce.p50_ms:.1f} ms.",
        f"cuts its chunks itself, takes {of('liger', SMOOTHED).p50_ms:.0f}.",
        f"like Gemma's, took {low.p50_ms:.1f} ms for {usual.p50_ms:.1f}, with an error of"
        f" {low.hidden_error:.4f} in dE for {usual.hidden_error:.4f}".replace("0.0", ".0"),
    ):
        assert said in text, said


def test_errors_of_the_readme_are_measured():
    text = " ".join(README.split())
    rows = report.read(RESULTS / "h200-errors.json").rows

    def said(which: str, choice: str, *, of_text: bool = True, real: bool = False) -> str:
        """From the least to the greatest."""
        name = "naive" if choice == "optax" else "auto"
        wanted = Settings(
            label_smoothing=0.1, gradient_filter="auto" if name == "naive" else choice
        )
        found = [
            getattr(row, which)
            for row in rows
            if row.run.implementation == name
            and (row.run.settings == wanted or not of_text)
            and (row.run.settings.gradient_filter == wanted.gradient_filter)
            and (row.inputs == "real" if real else row.inputs != "flat" or not of_text)
        ]
        assert len(found) > 1
        return f"{min(found):.4f} to {max(found):.4f}".replace("0.", ".")

    for claim in (
        f"errors there, of both, are {said('hidden_error', 'auto', real=True)} in dE and"
        f" {said('head_error', 'auto', real=True)} in dC, where optax has"
        f" {said('hidden_error', 'optax', real=True)} and {said('head_error', 'optax', real=True)}",
        f"Its errors are {said('hidden_error', 'fp8', of_text=False)} in dE and"
        f" {said('head_error', 'fp8', of_text=False)} in dC wherever they were measured since dE's"
        f" last correction, optax's {said('hidden_error', 'optax')} and"
        f" {said('head_error', 'optax')} but for flat inputs and under a softcap",
    ):
        assert claim in text, claim
    exact = [row for row in rows if row.run.settings == EXACT]
    assert len(exact) == 2
    assert {f"beside {row.hidden_error:.4f} that exact".replace("0.", ".") for row in exact} == {
        "beside .0019 that exact"
    }
    assert "beside .0019 that exact" in text


def test_errors_under_options_are_measured():
    lines = (RESULTS / "h200-options-errors.txt").read_text().splitlines()
    rows = [line for line in lines if re.match(r"\S+ +\d,\d{3}  ", line)]
    assert len(rows) == 42
    eight = [line[53:77].split() for line in rows]
    biased = [line[101:].split()[0] for line in rows if " like " in line and " bias" in line]
    biased = [error for error in biased if error != "–"]
    assert len(biased) == 8
    ranges = [f"{min(errors)} to {max(errors)}" for errors in list(zip(*eight, strict=False))[:2]]
    said = " ".join(README.split())
    assert f"at four heads {' and '.join(ranges)} (" in said
    assert f"error of dE, or more, to {min(biased)} to {max(biased)}." in said


def test_the_ways_of_flat_tokens_are_measured():
    lines = (RESULTS / "h200-flat-tiles.txt").read_text().splitlines()
    (ours, optax), *_ = (
        re.match(r" +18 +([0-9.]+) .* ([0-9.]+) +[0-9.]+ +[0-9.]+$", line).groups()
        for line in lines
        if line.startswith("   18")
    )
    assert f"{ours} ms, where optax takes {optax}" in " ".join(README.split())


def test_the_readmes_steps_are_measured():
    (text,) = (
        part for part in README.split("\n\n") if part.startswith("| model | rows | tokens/s")
    )
    found: dict[tuple[str, bool, int, str], set[str]] = {}
    fastest: dict[str, float] = {}
    for path in RESULTS.glob("h200-train-step-*.json"):
        for step in map(from_json, json.loads(path.read_text())):
            if step.variant.bits != "repeatable" or not step.measured or not step.tokens_per_s:
                continue
            if step.variant.framework == "torch":
                if path.name == "h200-train-step-real.json":
                    best = fastest.get(step.model, 0.0)
                    fastest[step.model] = max(best, step.tokens_per_s)
                continue
            mfu = f"{step.mfu:.1%}"
            cells = {f"{step.tokens_per_s:,.0f}", mfu, f"{step.measured.peak_gb:.1f}"}
            key = step.model, bool(step.checkpoint), step.variant.rows, step.variant.filter
            found[key] = found.get(key, set()) | cells
    names = {
        "SmolLM2 135M": "smollm2-135m",
        "Gemma 3 270M": "gemma3-270m",
        "Llama 3.2 1B": "llama3.2-1b",
        "Gemma 2 2B": "gemma2-2b",
    }
    lines = text.splitlines()[2:]
    assert len(lines) == 4
    for line in lines:
        what, rows, speed, peer, mfu, memory = (cell.strip() for cell in line.split("|")[1:-1])
        name, weights, *more = what.split(", ")
        chosen = "auto" if more == ["`--gradient-filter auto`"] else "fp8"
        own = weights == "its own weights on Alpaca"
        assert own or weights == "random weights"
        assert {speed, mfu, memory} <= found[names[name], own, int(rows), chosen], what
        assert peer == (f"{fastest[names[name]]:,.0f}" if own else ""), what
    said = " ".join(README.split())
    filtered = r"auto` SmolLM2 took ([\d,]+) tokens/s, Gemma 3 ([\d,]+) and Llama ([\d,]+)\."
    filtered = re.search(filtered, said)
    assert filtered[1] in found["smollm2-135m", True, 64, "auto"]
    assert filtered[2] in found["gemma3-270m", True, 32, "auto"]
    assert filtered[3] in found["llama3.2-1b", False, 8, "auto"]
    whole = json.loads((RESULTS / "h200-whole-run.json").read_text())
    assert f"killed at step {whole['killed']['at_step']} of 300 and resumed" in said


def test_the_readmes_starts_are_measured():
    lines = (RESULTS / "h200-starts.txt").read_text().splitlines()
    found = [re.search(r"process (\d) +first step +([0-9.]+) s", line) for line in lines]
    seconds = [(match[1], float(match[2])) for match in found if match]
    cold = [x for number, x in seconds if number == "1"]
    warm = [x for number, x in seconds if number != "1"]
    said = " ".join(README.split())
    assert f"is there {min(cold):.0f} to {max(cold):.0f} seconds after" in said
    assert f"in later processes after {min(warm):.1f} to {max(warm):.1f}." in said


def test_what_a_filter_does_to_training():
    """The README's lines, out of texts of runs and of times."""
    text = (RESULTS / "h200-filter-training.txt").read_text()
    of_gemma, _, _ = text.partition("The same of SmolLM2 135M")
    last = {}
    for line in of_gemma.splitlines():
        if match := re.match(r"([0-9.]+), (no cap|cap \d+) +(\S+) +(.*)", line):
            beta, cap, choice, rest = match.groups()
            last[beta, cap, choice] = rest.split()[-5]
    plain, smoothed = (
        lambda choice, beta=beta: last[beta, "no cap", choice] for beta in ("0", "0.1")
    )
    products, errors = {}, {}
    for line in (RESULTS / "h200-filter-epsilon.txt").read_text().splitlines():
        if match := re.match(r"gemma2-2b +8192 +(\S+) +[0-9.]+ +([0-9.]+)", line):
            products[match[1]] = f"{float(match[2]):.2f}"
        if match := re.match(r"smollm2-135m +8192 +(\S+) .* (\.\d+) +(\.\d+)$", line):
            errors[match[1]] = match[2], match[3]
    said = " ".join(README.split())
    for claim in (
        f"at a loss of {plain('2^-14')} in place of {plain('fp8')} at β = 0",
        f"at β = 0.1 of {smoothed('2^-14')} in place of {smoothed('none')}",
        f'where "fp8" came to {smoothed("fp8")}',
        f"{products['2^-10.2']} products in place of {products['2^-14.2']} in one call, and ended"
        f' at {smoothed("auto")}, "hidden" with it at {smoothed("hidden")}',
        f"at {smoothed('2^-16')} and takes {products['2^-16.2']} products, where optax took"
        f" {products['optax']}",
    ):
        assert claim in said
    for cap, beta in (("cap 30", "0.1"), ("cap 15", "0")):
        assert float(last[beta, cap, "auto"]) > 1.5 * float(last[beta, cap, "fp8"])


def test_what_precision_costs():
    """Products and errors of the README's line, out of a script's text."""
    found = (RESULTS / "h200-precision-fp8.txt").read_text()
    default, low = (
        float(re.search(rf", {name} [0-9.]+ ms \(([0-9.]+) M\)", found)[1])
        for name in ("default", "fp8")
    )
    (rms, mean) = re.search(r"off by ([0-9.]+) rms, .* mean -([0-9.]+) of", found).groups()
    text = " ".join(README.split())
    assert f"{low:.2f} products for {default:.2f}" in text
    said = f"off by {float(rms):.4f} nats, the mean loss by {float(mean):.4f}".replace("0.", ".")
    assert said in text


def test_the_largest_batches_fit():
    found = json.loads((RESULTS / "h100-step-memory-batch.json").read_text())
    most = {
        loss: max(row["rows"] for row in found if row["loss"] == loss) for loss in ("auto", "naive")
    }
    assert all(row["found"]["peak"] < 80e9 for row in found)
    text = f"{most['auto']} of its rows fit into 80 GB, and {most['naive']} with optax's loss"
    assert text in " ".join(README.split())


def test_the_readme_says_of_the_paper_what_its_results_say():
    """Their pages are small, and its table has lines of the page that it links first."""
    folder = ROOT / "benchmarks" / "paper" / "results"
    linked = re.findall(r"\(benchmarks/paper/results/([\w.-]+)\)", README)
    assert set(linked) <= {path.name for path in folder.glob("*")}
    for page in folder.glob("*.html"):
        assert page.stat().st_size < 2e6, page.name
    first = linked[0].removesuffix(".html")
    lines = (folder / f"{first}-headline.md").read_text().splitlines()
    told = [line for line in README.splitlines() if re.match(r"\| .+ \| (acc|ECE|NLL|AUR)", line)]
    assert {re.split(r"\| |,", line)[1].strip() for line in told} == {
        *("held-out tokens", "arc-easy", "mmlu", "hellaswag")
    }
    assert set(told) <= set(lines)
