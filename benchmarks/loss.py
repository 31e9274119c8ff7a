"""Time and memory of implementations of the loss: python -m benchmarks.loss --case tiny.

Every combination of --case, --n, --implementation, --mode, --label-smoothing and --gradient-filter
is a row. Extra MB is what the compiled program needs beyond its arguments, temporaries and outputs
(the gradients), by the compiler's own analysis. TFLOP/s counts one matrix product for fwd and three
for fwdbwd; its share, and "× matmul", are against a bare product E·Cᵀ timed in the same run. With
--devices both are split after the tokens, and memory is that of one device.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import jax

from benchmarks import flags, implementations, inputs
from benchmarks.flags import shown
from benchmarks.frameworks.jax import JaxFramework, check_devices
from benchmarks.implementations.settings import MODES, Mode, Run, Settings, gradient_filter
from benchmarks.inputs import cases
from benchmarks.measure import errors, report, runner

KNOWN = implementations.of_framework("jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossFlags(flags.TimedFlags):
    case: Annotated[tuple[str, ...], shown(f"{{{','.join(cases.CASES)},DxV}} ...")] = ("tiny",)
    """Shapes to measure at."""
    n: Annotated[tuple[int, ...] | None, shown("TOKENS ...", "each case's own")] = None
    """Numbers of tokens, instead of the cases' own."""
    devices: Annotated[int, shown("COUNT")] = 1
    """Devices that share the tokens, each with the whole head."""
    implementation: Annotated[tuple[str, ...], shown(f"{{{','.join(KNOWN)}}} ...")] = (
        "auto",
        "naive",
    )
    """Who computes the loss."""
    mode: tuple[Mode, ...] = MODES
    """The loss alone, and with its gradients."""
    label_smoothing: Annotated[tuple[float, ...], shown("BETA ...")] = (0.1,)
    """β in [0, 1]."""
    gradient_filter: Annotated[
        tuple[str, ...], shown("{auto,none,fused,hidden,fp8,EPSILON} ...")
    ] = ("auto",)
    """Which gradients: none is exact, hidden filters dE alone, fp8 drops nothing."""
    precision: Annotated[Literal["fp8"] | None, shown("{fp8}", "the operands' own")] = None
    """Permit 8-bit operands for the logits."""
    softcap: Annotated[float | None, shown("CAP", "off")] = None
    """cap·tanh(z/cap) on the logits."""
    vocab_order: bool = False
    """Hand over the classes sorted by mean logit."""
    stats: bool = False
    """Compute the per-token statistics too."""
    inputs: Annotated[str, flags.shown_inputs()] = "peaked"
    dtype: Annotated[str | None, shown("{bfloat16,float32}", "bfloat16 unless on a CPU")] = None
    """The dtype of hidden states and head."""
    seed: Annotated[int, shown("SEED")] = 0
    """Decides the random inputs."""
    errors: bool = False
    """Compare the gradients with exact ones in float32."""

    def check(self) -> None:
        super().check()
        flags.check_at_least(1, "--n", *self.n or ())
        flags.check_at_least(1, "--devices", self.devices)
        flags.check_at_least(0, "--seed", self.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("loss", parse, measure_all, arguments)


def parse(arguments: Sequence[str] | None = None) -> LossFlags:
    return flags.parse(LossFlags, "loss", __doc__, arguments)


def measure_all(options: LossFlags) -> int:
    total = report.Report()
    runs = runs_of(options)
    shapes = [cases.find(name, n) for name in options.case for n in options.n or [None]]
    for case in shapes:
        check_devices(options.devices, case.n)
    for case in shapes:
        measured = measure(case, runs, options)
        report.show(measured)
        total += measured
        if options.json:  # after each case, so that an interrupted run leaves what it has
            report.write(total, options.json)
    return 0 if total.rows else 1


def measure(case: cases.Case, runs: list[Run], options: LossFlags) -> report.Report:
    """All runs at one case's shapes."""
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    data = inputs.named(options.inputs, case, dtype, seed=options.seed)
    return runner.measure_runs(
        JaxFramework(data, options.devices),
        data,
        case.name,
        runs,
        seconds=options.seconds,
        commit=options.commit,
        reference=errors.Reference(None, data, compute=options.errors),
        announce=lambda line: print(f"  {line} …", file=sys.stderr, flush=True),
    )


def runs_of(options: LossFlags) -> list[Run]:
    """The rows that the flags ask for. ValueError names a wrong value and the valid ones."""
    for name in options.implementation:
        if name in implementations.of_framework("torch"):
            raise ValueError(f"{name!r} runs in PyTorch, which python -m benchmarks.table measures")
        if name not in KNOWN:
            raise ValueError(f"no implementation {name!r}; must be any of {', '.join(KNOWN)}")
    return [
        Run(
            name,
            mode,
            Settings(
                label_smoothing=beta,
                softcap=options.softcap,
                gradient_filter=gradient_filter(text),
                vocab_order=options.vocab_order,
                stats=options.stats,
                precision=options.precision,
            ),
        )
        for beta, text, name, mode in itertools.product(
            options.label_smoothing, options.gradient_filter, options.implementation, options.mode
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
