"""The best tiles of the Hopper kernels, by trying them: python -m benchmarks.tune --case gemma2-2b.

Three stages, each with the winner of the one before: the forward alone, forward and backward with
the default filter, and both without a filter. A stage is a few passes, each over the combinations
of some fields, because all the fields at once would take days. The candidates of a pass are
compiled side by side and timed in turn, with a bare product E·Cᵀ among them: clocks drift, and a
kernel that draws more power slows down what is timed after it. The fastest of many is in part the
luckiest, so it then meets the tiles taken now once more, and replaces them only if it is clearly
faster again. At the end stand the entries for `TUNED` in lsce/backends/hopper/tuned.py;
`ruff format` breaks their lines.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import flags, inputs
from benchmarks.flags import shown
from benchmarks.inputs import cases, like_models
from benchmarks.inputs.arrays import Inputs
from benchmarks.measure import memory, runner, timing
from benchmarks.measure.report import write_json
from lsce.backends import Arrays, hopper
from lsce.backends.hopper import choose
from lsce.backends.hopper.tiles import BackwardTiles, ForwardTiles, Tiles
from lsce.loss import weighted
from lsce.problem import Problem, cdiv

Stage = Literal["forward", "sparse", "exact"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""The fields of `Tiles` that are tuned, in this order."""
Axis = list[dict[str, int]]
"""The changes to choose from along one direction of a search."""

LABEL_SMOOTHING = 0.1
AGREEMENT = 0.01
"""How far loss and norms of gradients may be from those of the first tiles, relatively."""
GAIN = 0.02
"""By how much of its time a winner must beat the first tiles when it meets them again."""


# What to try


def passes(stage: Stage, start: Tiles, d: int) -> tuple[tuple[Axis, ...], ...]:
    """The directions that each pass of a stage combines, for a hidden size.

    They lead back to the values of `start`: those of a heuristic are like no table's.
    """
    part = getattr(start, stage)

    def axis(name: str, *values: int) -> Axis:
        return [{name: value} for value in sorted({*values, getattr(part, name)})]

    cluster = axis("cluster", 1, 2)
    if stage == "forward":
        shape = "tile_n", "tile_v"
        sizes = sorted({(64, 256), (128, 128), (part.tile_n, part.tile_v)})
        shapes: Axis = [dict(zip(shape, values, strict=True)) for values in sizes]
        return (
            (shapes, axis("steps", 3, 4), cluster),
            (axis("tile_d", 32, 64), axis("steps", 3, 4, 6, 8)),
        )
    covering = _covering(d)
    head = axis("tile_c", 128, 256), axis("head_c", 128, 256), axis("head_d", *covering)
    hidden = axis("hidden_d", *covering), axis("hidden_splits", 1, 2)
    ring = axis("steps", 3, 4, 6), cluster
    if stage == "sparse":
        # Both sizes of P's buffer, of which the larger counts: they meet at 8,192 tokens.
        here = part.slots, part.slots_per_block
        slots = [
            {"slots": slots, "slots_per_block": per_block}
            for slots, per_block in sorted({*((64 * k, k) for k in (10, 20, 40)), here})
        ]
        return (
            head,
            hidden,
            (axis("width", 4096, 8192, 16384), slots),
            (*ring, axis("blocks", 1, 2)),
        )
    return head, hidden, (axis("slots_per_block", 16, 32, 44, 58),), ring


def candidates[T: (ForwardTiles, BackwardTiles)](base: T, axes: Iterable[Axis]) -> list[T]:
    """`base`, then what else can be built of it by one change of every axis, each once."""
    found = {base: None}
    for changes in itertools.product(*axes):
        fields = {name: value for change in changes for name, value in change.items()}
        try:
            found[dataclasses.replace(base, **fields)] = None
        except ValueError:
            continue  # it does not fit the registers or the shared memory
    return list(found)


def _covering(d: int) -> list[int]:
    """The three widest tiles over the hidden size that stay within a fifth of it."""
    fitting = [width for width in range(64, 257, 64) if cdiv(d, width) * width <= 1.2 * d]
    return (fitting or [choose.even_tile(d, 256)])[-3:]


# The search


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate: its time, or why it has none or may not win."""

    stage: Stage
    tiles: Tiles
    time: timing.Timing | None = None
    matmul_ms: float | None = None
    """Median of the bare product E·Cᵀ, timed in turn with it."""
    temporary_mb: float | None = None
    results: tuple[float, ...] = ()
    """The loss in nats, and the norms of its gradients."""
    failure: str | None = None

    @property
    def ratio(self) -> float:
        """Its time over the bare product's; ∞ where it failed."""
        if self.failure is not None or self.time is None or self.matmul_ms is None:
            return float("inf")
        return self.time.p50_ms / self.matmul_ms


Round = list[Trial]
"""What was timed in turn: the tiles to beat, then the others."""


def tune(
    start: Tiles,
    d: int,
    run: Callable[[Stage, list[Tiles]], Round],
    *,
    stages: Iterable[Stage] = STAGES,
    memory: float = 1.25,
    promised_mb: float = float("inf"),
    announce: Callable[[Tiles, Round], None] = lambda best, new: None,
) -> tuple[Tiles, list[Round]]:
    """The best tiles for hidden size `d` and every round on the way.

    `run` times candidates beside each other, and only those it was given at once are compared. A
    winner computes what the stage's first candidate computes, in at most `memory` times its
    temporaries and, unless those are more, in `promised_mb`; and it is faster by `GAIN` when both
    are timed again. `announce` is told the best after each round, and the round.
    """
    best, rounds = start, []
    reference: Trial | None = None

    def meet(stage: Stage, candidates: list[Tiles], gain: float) -> Tiles:
        """The fastest, if it beats the first by so much of its time; else the first."""
        nonlocal reference
        new = run(stage, candidates)
        reference = reference or next((trial for trial in new if trial.failure is None), None)
        if reference:
            held = reference.temporary_mb or 0
            most_mb = min(memory * held, max(promised_mb, held))
            new = [judged(trial, reference.results, most_mb) for trial in new]
        first, *others = new
        faster = [trial for trial in others if trial.ratio < (1 - gain) * first.ratio]
        chosen = min(faster, key=lambda trial: trial.ratio, default=first).tiles
        rounds.append(new)
        announce(chosen, new)
        return chosen

    for stage in stages:
        first, reference = best, None
        for axes in passes(stage, start, d):
            parts = candidates(getattr(best, stage), axes)
            best = meet(stage, [dataclasses.replace(best, **{stage: x}) for x in parts], gain=0)
        if best != first:
            best = meet(stage, [first, best], GAIN)
    return best, rounds


def judged(trial: Trial, results: tuple[float, ...], most_mb: float) -> Trial:
    """The trial, failed if it computes something else than `results` or takes too much memory."""
    if trial.failure is not None:
        return trial
    if not np.allclose(trial.results, results, rtol=AGREEMENT, atol=0):
        reason = f"wrong: {trial.results} instead of {results}"
    elif (trial.temporary_mb or 0) > most_mb:
        reason = f"more than {most_mb:,.1f} MB"
    else:
        return trial
    return dataclasses.replace(trial, failure=reason)


def promised_mb(case: cases.Case) -> float:
    """The temporaries, in 2²⁰ bytes, that leave both passes within a quarter of optax's memory.

    As `choose.within_a_quarter` of the backend has it: naive optax takes 4NV bytes and the
    gradients. Where those alone are more than a quarter there is nothing to keep, hence ∞.
    """
    gradients = 2 * (case.n + case.v) * case.d
    left = (4 * case.n * case.v + gradients) / 4 - gradients
    return left / memory.MB if left > 0 else float("inf")


# On the device


def program(stage: Stage, problem: Problem, chosen: Tiles) -> Callable[..., Any]:
    """(hidden, head, labels) → the mean loss, with the gradients of both after the forward."""
    # Imported here: without a Hopper GPU nothing of Mosaic GPU should load.
    from lsce.backends.hopper.call import Call

    epsilon = None if stage == "exact" else "auto"
    call = Call(problem, epsilon, chosen, hopper.streaming_multiprocessors())

    def loss(hidden: Any, head: Any, labels: Any) -> Any:
        n = labels.shape[0]
        arrays, weights = Arrays(hidden, head, labels), jnp.full(n, 1 / n, jnp.float32)
        return weighted(hopper.BACKEND, problem, arrays, weights, summed=True, call=call)[0]

    return loss if stage == "forward" else jax.value_and_grad(loss, argnums=(0, 1))


class Bench:
    """Times candidates on one set of inputs, which it holds on JAX's first device."""

    def __init__(self, data: Inputs, seconds: float):
        case = data.case(data.kind)
        if case.d % 64 or case.n % 8 or case.v % 8 or min(case.n, case.v) < 16:
            raise ValueError(
                f"{case} would be padded, and what is timed here is not: N and V must be "
                "multiples of 8 from 16 on, D a multiple of 64"
            )
        self.problem = problem_of(case)
        self.seconds = seconds
        self.arrays = jax.device_put((data.hidden, data.head, data.labels), jax.devices()[0])
        self.compiled: dict[tuple[Stage, Tiles], concurrent.futures.Future[Any]] = {}

    def __call__(self, stage: Stage, candidates: list[Tiles]) -> list[Trial]:
        """Compiles all side by side, then times in turn those that run."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for chosen in candidates:
                if (stage, chosen) not in self.compiled:
                    self.compiled[stage, chosen] = pool.submit(self._compile, stage, chosen)
        trials = [self._run(stage, chosen) for chosen in candidates]
        able = [trial for trial in trials if trial.failure is None]
        calls = [self._call(stage, trial.tiles) for trial in able]
        bare, *times = timing.beside(
            [timing.product(*self.arrays[:2]), *calls], seconds=self.seconds
        )
        timed = {
            trial.tiles: dataclasses.replace(trial, time=time, matmul_ms=bare.p50_ms)
            for trial, time in zip(able, times, strict=True)
        }
        return [timed.get(trial.tiles, trial) for trial in trials]

    def _compile(self, stage: Stage, chosen: Tiles) -> Any:
        return jax.jit(program(stage, self.problem, chosen)).lower(*self.arrays).compile()

    def _call(self, stage: Stage, chosen: Tiles) -> Callable[[], Any]:
        return functools.partial(self.compiled[stage, chosen].result(), *self.arrays)

    def _run(self, stage: Stage, chosen: Tiles) -> Trial:
        """What it computes and its memory, without a time."""
        try:
            outputs = self._call(stage, chosen)()
            results = tuple(float(_norm(x)) for x in jax.tree.leaves(outputs))
        except Exception as error:
            # Tracing, Mosaic GPU, ptxas and the driver each refuse in their own way.
            text = str(error).strip().partition("\n")[0][:300]
            return Trial(stage, chosen, failure=f"{type(error).__name__}: {text}")
        extra = memory.extra_memory(self.compiled[stage, chosen].result())
        return Trial(stage, chosen, temporary_mb=extra.temporary_mb, results=results)


def problem_of(case: cases.Case) -> Problem:
    """The loss at a case's shapes in bfloat16 on JAX's first device."""
    device = jax.devices()[0]
    return Problem(
        n=case.n,
        d=case.d,
        v=case.v,
        hidden_dtype=np.dtype(jnp.bfloat16),
        head_dtype=np.dtype(jnp.bfloat16),
        platform=device.platform,
        chip=device.device_kind,
        label_smoothing=LABEL_SMOOTHING,
    )


@jax.jit
def _norm(x: Any) -> Any:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


# What comes out


def entry(chip: str, case: cases.Case, chosen: Tiles) -> str:
    """A line of `lsce.backends.hopper.tuned.TUNED`: the stages whose tiles are not the heuristic's.

    Every field is spelt out, as defaults may change.
    """
    usual = choose.heuristic(case.n, case.d, case.v, hopper.streaming_multiprocessors())
    parts = [name for name in STAGES if getattr(chosen, name) != getattr(usual, name)]
    if not parts:
        return f"    # {case}: the heuristic's tiles"
    family, n = choose.family(chip) or chip, choose.nearest_power_of_two(case.n)
    fields = "".join(f"        {name!r}: {getattr(chosen, name)!r},\n" for name in parts)
    return f'    ("{family}", {n}, {case.d}, {case.v}, "bfloat16"): {{\n{fields}    }},'


def show(case: cases.Case, trials: Round, console: Console | None = None) -> None:
    """A round's table, the fastest first and the failed last, by the fields that differ in it."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 140
    stage = trials[0].stage
    parts = [dataclasses.asdict(getattr(trial.tiles, stage)) for trial in trials]
    fields = [name for name in parts[0] if len({part[name] for part in parts}) > 1]
    table = Table(box=None, header_style="bold", title=f"{case}: {stage}", title_justify="left")
    for column in (*fields, "p50 ms", "× matmul", "temporary MB"):
        table.add_column(column, justify="right")
    table.add_column("", overflow="fold")
    pairs = zip(trials, parts, strict=True)
    for trial, part in sorted(pairs, key=lambda pair: (bool(pair[0].failure), pair[0].ratio)):
        table.add_row(
            *(str(part[name]) for name in fields),
            f"{trial.time.p50_ms:.4g}" if trial.time else "–",
            f"{trial.time.p50_ms / trial.matmul_ms:.3f}" if trial.time and trial.matmul_ms else "–",
            "–" if trial.temporary_mb is None else f"{trial.temporary_mb:,.1f}",
            escape(trial.failure or ("to beat" if trial is trials[0] else "")),
        )
    console.print(table)


def environment(commit: str | None) -> dict[str, Any]:
    """What the trials ran on, for their JSON."""
    device = jax.devices()[0]
    return {
        "command": " ".join(["python -m benchmarks.tune", *sys.argv[1:]]),
        "gpu": device.device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "platform": device.client.platform_version,
        },
        "commit": commit or runner.current_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneFlags(flags.TimedFlags):
    case: Annotated[tuple[str, ...], shown(f"{{{','.join(cases.CASES)},DxV}} ...", "required")]
    """Shapes to tune at."""
    n: Annotated[int | None, shown("TOKENS", "each case's own")] = None
    """Number of tokens, instead of the cases' own."""
    stage: tuple[Stage, ...] = STAGES
    """Each starts from the tiles that the backend takes now."""
    inputs: Annotated[str, flags.shown_inputs("typical, with a real model's column statistics")] = (
        "typical"
    )
    seconds: Annotated[float, shown("S")] = 0.5
    """About how long to time each."""
    memory: Annotated[float, shown("TIMES")] = 1.25
    """Most temporaries of a winner, relative to where its stage began; never so much that a quarter
    of naive optax's memory is exceeded."""

    def check(self) -> None:
        super().check()
        flags.check_at_least(1, "--n", self.n)
        if not self.memory >= 1:
            raise ValueError(
                f"--memory must be at least 1, what the first tiles take, not {self.memory:g}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("tune", parse, tune_all, arguments)


def parse(arguments: Sequence[str] | None = None) -> TuneFlags:
    return flags.parse(TuneFlags, "tune", __doc__, arguments)


def tune_all(options: TuneFlags) -> int:
    """Tunes one case after the other; prints their rounds, and their entries at the end."""
    shapes = [cases.find(name, options.n) for name in options.case]
    for case in shapes:
        if reason := hopper.BACKEND.refuses(problem_of(case)):
            raise ValueError(f"{hopper.BACKEND.name} {reason}")
    report = environment(options.commit) | {"inputs": options.inputs, "cases": []}
    entries = []
    for case in shapes:
        typical = options.inputs == "typical"
        data = like_models.draw(case) if typical else inputs.named(options.inputs, case, "bfloat16")
        bench = Bench(data, options.seconds)
        record: dict[str, Any] = dataclasses.asdict(case) | {"rounds": []}
        report["cases"].append(record)

        def announce(best: Tiles, new: Round, case: Any = case, record: Any = record) -> None:
            show(case, new)
            record["best"] = dataclasses.asdict(best)
            record["rounds"].append([dataclasses.asdict(trial) for trial in new])
            if options.json:  # after each round, so that an interrupted run leaves what it has
                write_json(report, options.json)

        best, _ = tune(
            choose.tiles_for(bench.problem, hopper.streaming_multiprocessors()),
            case.d,
            bench,
            stages=options.stage,
            memory=options.memory,
            promised_mb=promised_mb(case),
            announce=announce,
        )
        entries.append(entry(bench.problem.chip, case, best))
    print("\n".join(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
