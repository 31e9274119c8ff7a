"""A whole training step, ours and PyTorch's: python -m benchmarks.train_step.

Weights are random and tokens have Zipf's frequencies, or --checkpoint's and --data's; rows are
packed as the trainer packs. Each --variant is a step to measure, what it says apart from the
defaults joined by commas:

    rows=32  segments=packed|masked|one  loss=auto|naive|…  filter=fp8|auto|…  beta=0.1
    remat=none|block|full  scan=auto|on|off  attention=auto|cudnn|xla
    bits=repeatable|excluded|tuned  accumulate=1  mesh=data=2|fsdp=2|data=2+fsdp=2  layers=2

and "torch,rows=32,loss=full|liger|cut-cross-entropy,beta=0" is transformers' model with SDPA,
torch.compile and fused AdamW, in a process of its own; it sees rows whole. MFU counts 6 operations
for each weight of a matrix product, the head once, and 12 · heads · H for each key that a token
sees, none twice for being recomputed, against 989 TFLOP/s (H100 and H200).
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np

from benchmarks import flags
from benchmarks.flags import shown
from benchmarks.measure import report
from benchmarks.measure.runner import current_commit
from benchmarks.steps import variant as variants
from benchmarks.steps.row import Measured, StepRow, markdown
from benchmarks.steps.variant import SHAPES, Variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStepFlags(flags.TimedFlags):
    model: Annotated[tuple[str, ...], shown(f"{{{','.join(SHAPES)}}} ...")] = ("smollm2-135m",)
    """Shapes to measure."""
    variant: Annotated[tuple[str, ...], shown("KEY=VALUE,... ...")] = ("", "torch,beta=0")
    """Steps to measure of each; "" is the trainer's with 16 rows."""
    length: Annotated[int, shown("TOKENS")] = 1024
    """Tokens in a row."""
    checkpoint: Annotated[str | None, shown("NAME")] = None
    """The --model's weights, as the trainer's --model names them, for JAX's rows in place of random
    ones; with --data."""
    data: Annotated[pathlib.Path | None, shown("FILE")] = None
    """Records to train on, with --checkpoint."""
    profile: bool = False
    """Print each step's kernels, too."""
    here: Annotated[bool, shown("", help="Start no process for PyTorch.")] = False

    def check(self) -> None:
        super().check()
        flags.check_at_least(8, "--length", self.length)
        for name in self.model:
            if name not in SHAPES:
                raise ValueError(f"--model {name}: must be one of {', '.join(SHAPES)}")
        for text in self.variant:
            variants.read(text)
        if (self.checkpoint is None) != (self.data is None):
            raise ValueError("--checkpoint and --data go together")
        if self.checkpoint is not None and len(self.model) > 1:
            raise ValueError(
                f"--checkpoint {self.checkpoint} is one model's; --model names {len(self.model)}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.run("train_step", parse, make, arguments)


def parse(arguments: Sequence[str] | None = None) -> TrainStepFlags:
    return flags.parse(TrainStepFlags, "train_step", __doc__, arguments)


def make(options: TrainStepFlags) -> int:
    asked = [variants.read(text) for text in options.variant]
    rows: list[StepRow] = []
    for framework in ("torch", "jax"):  # JAX keeps what memory of the device it has had
        ours = [v for v in asked if v.framework == framework]
        for model in options.model if ours else ():
            for row in _rows(model, ours, framework, options):
                rows.append(row)
                print(markdown([row]).splitlines()[-1], file=sys.stderr, flush=True)
                if options.json:
                    report.write_json([dataclasses.asdict(row) for row in rows], options.json)
    print(markdown(rows))
    return 0 if any(row.measured for row in rows) else 1


def _rows(
    model: str, asked: Sequence[Variant], framework: str, options: TrainStepFlags
) -> Iterator[StepRow]:
    if framework == "torch" and not options.here:
        yield from _elsewhere(model, options)
        return
    real = None
    if framework == "jax":
        from benchmarks.steps import jax
        from benchmarks.steps.real import Real

        if options.checkpoint is not None and options.data is not None:
            real = Real.find(options.checkpoint, options.data)

        found = jax.measure(
            model,
            asked,
            options.length,
            seconds=options.seconds,
            profile=options.profile,
            real=real,
        )
    else:
        from benchmarks.steps import torch

        found = torch.measure(model, asked, options.length, seconds=options.seconds)
    for variant, result in found:
        shape = variants.shape_of(model, variant)
        random = functools.partial(variants.batch_of, shape)
        segments = (random if real is None else real.batch)(variant, options.length)["segments"]
        seen = np.ones_like(segments) if framework == "torch" else segments
        measured = result if isinstance(result, Measured) else None
        yield StepRow(
            model=model,
            variant=variant,
            length=options.length,
            segments_per_row=float(segments.max(axis=1).mean()),
            flops_per_token=variants.flops_per_token(shape, seen),
            measured=measured,
            error=None if measured else str(result),
            checkpoint=None if real is None else f"{options.checkpoint}, {options.data}",
            commit=options.commit or current_commit(),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


def _elsewhere(model: str, options: TrainStepFlags) -> Iterator[StepRow]:
    """PyTorch's rows from a process of its own, before JAX takes the device's memory."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--here", "--model", model]
    command += ["--length", str(options.length), "--seconds", str(options.seconds), "--variant"]
    command += [text for text in options.variant if variants.read(text).framework == "torch"]
    path = pathlib.Path(f"{options.json or 'train-step'}.torch")
    command += ["--json", str(path), "--commit", options.commit or current_commit()]
    path.unlink(missing_ok=True)  # of a run that was killed
    subprocess.run(command, stdout=sys.stderr, check=False)
    if path.exists():
        yield from map(from_json, json.loads(path.read_text()))
        path.unlink()


def from_json(fields: dict) -> StepRow:
    """The inverse of `dataclasses.asdict`. JAX's rows that name no filter had the library's."""
    measured, variant = fields["measured"], fields["variant"]
    unsaid = {"filter": "auto"} if variant["framework"] == "jax" else {}
    return StepRow(
        **fields
        | {
            "variant": Variant(**unsaid | variant),
            "measured": measured and Measured(**measured),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
