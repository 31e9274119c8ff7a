"""`python -m train.export`: a run's model as a folder that other tools load."""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m train.export")  # the imports below take seconds

import dataclasses
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train import command_line
from train.flags import shown
from train.models.weights import safetensors
from train.models.weights.load import save
from train.run import model as run_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Writes safetensors, config, tokenizer and generation config: a Hugging Face folder."""

    model: tyro.conf.Positional[Annotated[str, shown("RUN|MODEL")]]
    """A run's folder, or what --model can be in training."""
    folder: tyro.conf.Positional[Annotated[Path, shown("FOLDER")]]
    """Where to write: a new folder."""
    checkpoint: Annotated[str, shown("best|last|STEP")] = "last"
    """Of a run: the one with the least held-out NLL, the newest, or that of a step."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        shown("{float32,bfloat16,float16}", "as it was loaded"),
    ] = None
    """Of the weights in the files."""


def export(where: str, folder: Path, *, dtype: str | None = None, checkpoint: str = "last") -> None:
    """Writes the folder, whole or not at all.

    A model that was not trained is given back to the bit, as every dtype it can have had is in
    float32. A head that is the embedding table is not written twice.

    Raises:
      ValueError: if the folder is there already, and what `run.model.read` raises.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already: name a new folder")
    loaded = run_model.read(where, checkpoint=checkpoint)
    dtype = str(dtype or loaded.config_json.get("dtype", "float32"))
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        safetensors.save(save(loaded.shape, loaded.params, dtype), part)
        config = loaded.config_json | {"dtype": dtype, "torch_dtype": dtype}
        config.setdefault("architectures", [loaded.architecture])
        description = run_model.description(
            run_model.Chosen(loaded.shape, config_json=config), loaded.tokenizer
        )
        for name, content in description.items():
            (part / name).write_text(content, "utf-8")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a file could not be written, or 2 for a user's mistake."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        options = command_line.read(ExportOptions, "python -m train.export", arguments)
        export(options.model, options.folder, dtype=options.dtype, checkpoint=options.checkpoint)
    except (ValueError, OSError) as error:
        print(f"python -m train.export: {command_line.said(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for file in sorted(options.folder.iterdir()):
        print(f"{file.stat().st_size:>14,} B  {file}")
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
