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
from typing import Annotated, Any, Literal

import tyro

from train import command_line
from train.flags import shown
from train.models import families, resolve
from train.models.config import SHAPES
from train.models.weights import peft, safetensors
from train.models.weights.load import save
from train.run import folder as run_folder
from train.run import model as run_model

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Writes safetensors, config, tokenizer and generation config: a Hugging Face folder."""

    model: tyro.conf.Positional[Annotated[str, shown("RUN|MODEL")]]
    """A run's folder, or what --model can be in training."""
    folder: tyro.conf.Positional[Annotated[Path, shown("FOLDER")]]
    """Where to write: a new folder."""
    checkpoint: Annotated[str, shown("best|last|STEP")] = "last"
    """Which of a run: the one with the least held-out NLL, the newest, or that of a step."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        shown("{float32,bfloat16,float16}", "as it was loaded"),
    ] = None
    """The dtype of the weights in the files. That of adapters is float32, if none is given."""
    adapter: bool = False
    """Write the adapters of a run with --lora-rank alone, as PEFT has them, and not the model with
    them merged into it."""


def export(
    where: str,
    folder: Path,
    *,
    dtype: str | None = None,
    checkpoint: str = "last",
    adapter: bool = False,
) -> None:
    """Writes the folder, whole or not at all.

    A model that was not trained is given back to the bit, each tensor in its dtype, as every one
    that it can have had is in float32. A head that is the embedding table is not written twice.

    Raises:
      ValueError: if the folder is there already, if adapters are asked for and there are none, or
        none that would be of use without the run, and what `run.model.read` raises.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already: name a new folder")
    loaded = run_model.read(where, checkpoint=checkpoint, merge=not adapter)
    base = base_of(where, loaded) if adapter else None
    config, softcap = loaded.config_json, loaded.shape.final_softcap
    if not adapter and softcap != _softcap(config):
        config = config | {"final_logit_softcapping": softcap}  # which a Gemma's file can say
    if softcap != (theirs := _softcap(config)):
        logger.warning(
            "the run learnt logits bounded by --softcap %g, which these files cannot say: other"
            " tools will %s",
            softcap,
            "take logits as they are, and so probabilities further apart"
            if theirs is None
            else f"bound them by the {theirs:g} of the model that the adapters are on",
        )
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        if base is None:
            _write_model(loaded, config, dtype, part)
        else:
            peft.save(loaded.shape, loaded.params, base, part, dtype or "float32")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _softcap(config: dict[str, Any]) -> float | None:
    return families.read(config, "config.json").final_softcap


def _write_model(
    loaded: run_model.Loaded, config: dict[str, Any], dtype: str | None, folder: Path
) -> None:
    """All in `dtype`; without one each tensor in the dtype that it had."""
    narrower = config.get(run_model.NARROWER)
    config = {key: value for key, value in config.items() if key != run_model.NARROWER}
    others, dtype = None if dtype else narrower, dtype or str(config.get("dtype", "float32"))
    safetensors.save(save(loaded.shape, loaded.params, dtype, others), folder)
    config = config | {"dtype": dtype, "torch_dtype": dtype}
    config.setdefault("architectures", [loaded.architecture])
    description = run_model.description(
        run_model.Chosen(loaded.shape, config_json=config), loaded.tokenizer
    )
    for name, content in description.items():
        (folder / name).write_text(content, "utf-8")


def base_of(where: str, loaded: run_model.Loaded) -> str:
    """What the model that a run's adapters are on is called, by its name on the hub or its path.

    Raises:
      ValueError: if there are no adapters, or if the run alone has that model.
    """
    if loaded.shape.lora is None:
        raise ValueError(f"{where} has no adapters: export it without --adapter")
    base = run_folder.load(Path(where)).model.model
    if base in SHAPES:
        raise ValueError(
            f"the adapters of {where} are on random weights that only this run has: export it"
            " without --adapter"
        )
    path = Path(base)
    if path.is_file() or base in resolve.WHEELS:
        logger.warning(
            "the adapters are on %s, which PEFT cannot load: python -m train.export %s FOLDER makes"
            " a folder of it that it can, to be named in %s",
            base,
            base,
            peft.CONFIG,
        )
    return str(path.absolute()) if path.exists() else base.removeprefix(resolve.HUB)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a file could not be written, or 2 for a user's mistake."""
    try:
        options = command_line.read(ExportOptions, "python -m train.export", arguments)
        export(
            options.model,
            options.folder,
            dtype=options.dtype,
            checkpoint=options.checkpoint,
            adapter=options.adapter,
        )
    except (ValueError, OSError) as error:
        print(f"python -m train.export: {command_line.said(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for file in sorted(options.folder.iterdir()):
        print(f"{file.stat().st_size:>14,} B  {file}")
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
