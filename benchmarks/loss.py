"""Time and memory of implementations of the loss: python -m benchmarks.loss --case tiny.

Every combination of --case, --n, --implementation, --mode, --label-smoothing and --gradient-filter
is a row. Extra MB is what the compiled program needs beyond its arguments, temporaries and outputs
(the gradients), by the compiler's own analysis. TFLOP/s counts one matrix product for fwd and three
for fwdbwd; its share, and "× matmul", are against a bare product E·Cᵀ timed in the same run. With
--devices both are split after the tokens, and memory is that of one device.
"""

import argparse
import itertools
import sys

import jax

from benchmarks import cases, errors, flags, inputs, report, runner
from benchmarks.jax_framework import JaxFramework, check_devices
from benchmarks.jax_losses import LOSSES
from benchmarks.settings import MODES, Run, Settings, gradient_filter


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    total = report.Report()
    try:
        runs = runs_of(options)
        shapes = [cases.find(name, n) for name in options.case for n in options.n]
        for case in shapes:
            check_devices(options.devices, case.n)
        for case in shapes:
            measured = measure(case, runs, options)
            report.show(measured)
            total += measured
            if options.json:  # after each case, so that an interrupted run leaves what it has
                report.write(total, options.json)
    except (ValueError, OSError) as error:
        print(f"benchmarks.loss: {error}", file=sys.stderr)
        return 2
    return 0 if total.rows else 1


def measure(case: cases.Case, runs: list[Run], options: argparse.Namespace) -> report.Report:
    """All runs at one case's shapes."""
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    data = inputs.of(options.inputs, case, dtype, seed=options.seed)
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    about, _, notes = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.loss",
        description=about,
        epilog=notes,
    )
    add = parser.add_argument
    add(
        "--case",
        nargs="+",
        default=["tiny"],
        metavar="NAME",
        help=f"any of {', '.join(cases.CASES)}; default tiny",
    )
    add(
        "--n",
        nargs="+",
        type=flags.count,
        default=[None],
        help="tokens, instead of the case's own number",
    )
    add(
        "--devices",
        type=flags.count,
        default=1,
        metavar="N",
        help="devices that share the tokens, each with the whole head; default 1",
    )
    add(
        "--implementation",
        nargs="+",
        default=["auto", "naive"],
        metavar="NAME",
        help=f"any of {', '.join(LOSSES)}; default auto naive",
    )
    add(
        "--mode",
        nargs="+",
        default=list(MODES),
        metavar="MODE",
        help=f"any of {', '.join(MODES)}; default both",
    )
    add(
        "--label-smoothing",
        nargs="+",
        type=float,
        default=[0.1],
        metavar="BETA",
        help="β in [0, 1]; default 0.1",
    )
    add(
        "--gradient-filter",
        nargs="+",
        default=["auto"],
        metavar="FILTER",
        help="auto (default), none (exact), fused or a number",
    )
    add("--softcap", type=float, help="cap·tanh(z/cap) on the logits")
    add("--vocab-order", action="store_true", help="hand over the classes sorted by mean logit")
    add("--stats", action="store_true", help="compute the per-token statistics too")
    add(
        "--inputs",
        default="peaked",
        help=f"{inputs.CHOICES}; default %(default)s",
    )
    add("--dtype", help="bfloat16 or float32; bfloat16 unless on a CPU")
    add("--seed", type=flags.seed, default=0, help="of the random inputs; default 0")
    add(
        "--seconds",
        type=flags.positive,
        default=2.0,
        help="about how long to time each row; default 2",
    )
    add("--errors", action="store_true", help="compare the gradients with exact ones in float32")
    add("--json", type=flags.new_file, metavar="FILE", help="write the rows there")
    add("--commit", help="recorded instead of git's answer, where the checkout has no git")
    return parser.parse_args(arguments)


def runs_of(options: argparse.Namespace) -> list[Run]:
    """The rows that the flags ask for. ValueError names a wrong value and the valid ones."""
    for name in options.implementation:
        if name not in LOSSES:
            raise ValueError(f"no implementation {name!r}; must be any of {', '.join(LOSSES)}")
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
            ),
        )
        for beta, text, name, mode in itertools.product(
            options.label_smoothing, options.gradient_filter, options.implementation, options.mode
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
