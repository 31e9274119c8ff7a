"""Hugging Face's folders: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from train.models.weights.tensors import broken

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class SafetensorsFolder:
    """The tensors of a folder; `Tensors` says what it offers.

    Raises:
      ValueError: naming the file, if there are no safetensors, if a file is missing, truncated or
        corrupt, does not hold what the index says, or holds other than floating numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        listed = _listed(folder)
        for file in sorted(set(listed.values())) if listed else [folder / WHOLE]:
            if not file.is_file():
                raise ValueError(f"{folder / INDEX} names {file.name}, which is not there")
            dtypes |= self._open(file)
        wrong = [name for name, file in listed.items() if self._file_of.get(name) != file]
        if wrong:
            raise ValueError(
                f"{folder / INDEX} says that {wrong[0]} is in {listed[wrong[0]].name}; it is not"
            )
        several = set(dtypes.values())
        self.dtype = several.pop() if len(several) == 1 else "float32"
        self.narrower = {name: own for name, own in dtypes.items() if own != self.dtype}

    def _open(self, file: Path) -> dict[str, str]:
        dtypes = {}
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    view = opened.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self._file_of[name] = file
                    dtypes[name] = view.get_dtype()
        except SafetensorError as error:
            raise broken(file, error) from None
        other = set(dtypes.values()) - DTYPES.keys()
        if other:
            raise ValueError(
                f"{file} holds {', '.join(sorted(other))}: quantized safetensors are not read,"
                " take the model's bfloat16 or float32 files"
            )
        return {name: DTYPES[dtype] for name, dtype in dtypes.items()}

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._file_of[name], framework="np") as opened:
            return opened.get_tensor(name)


def _listed(folder: Path) -> dict[str, Path]:
    """The file of each tensor by the folder's index; empty if it has no index."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            parts = sorted(file.name for file in folder.glob("*.safetensors"))
            if parts:
                many = f"{parts[0]} to {parts[-1]}" if len(parts) > 1 else parts[0]
                raise ValueError(
                    f"{folder} holds {many} ({len(parts)}), but no {WHOLE}, and no {INDEX}, which"
                    " says what is in which: fetch that too"
                )
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            hint = "; pickled weights are not read, as they can run code" if pickled else ""
            raise ValueError(f"there is no {WHOLE} and no {INDEX} in {folder}{hint}")
        return {}
    try:
        files: Mapping[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        outside = [file for file in files.values() if Path(file).name != file]
        if outside or not files:
            raise ValueError(f"it names {outside[0]!r}" if outside else "it names no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of safetensors ({error!r})") from None
    return {name: folder / file for name, file in files.items()}


def write_file(tensors: dict[str, np.ndarray], path: Path) -> None:
    """One safetensors file, which others may read if they may read any new file.

    Raises OSError if it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        # The mark that transformers looks for.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its words for a full disk, too
        raise OSError(f"{path.name} cannot be written: {error}") from None
    path.chmod(mode)  # save_file leaves the file to its owner alone


def save(
    tensors: Iterable[tuple[str, np.ndarray]], folder: Path, shard_bytes: int = 4_000_000_000
) -> None:
    """Writes tensors into a folder: one file, or where they are more than a shard several and an
    index. No more than one shard is in memory at a time."""
    files: list[list[str]] = []
    kept: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        write_file(kept, folder / f"part-{len(files)}.safetensors")
        files.append(list(kept))
        kept.clear()

    for name, tensor in tensors:
        if kept and sum(t.nbytes for t in kept.values()) + tensor.nbytes > shard_bytes:
            write()
        kept[name] = tensor
        total += tensor.nbytes
    write()
    index = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        final = WHOLE if len(files) == 1 else final
        (folder / f"part-{number}.safetensors").rename(folder / final)
        index |= dict.fromkeys(names, final)
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
