"""Hidden states, head and labels, in memory and in files."""

import dataclasses
import pathlib
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.inputs.cases import Case

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


class Arrays(NamedTuple):
    """The arrays of one call, of NumPy or JAX, as they are drawn or read."""

    hidden: Float[Array | np.ndarray, "N D"]
    head: Float[Array | np.ndarray, "V D"]
    labels: Int[Array | np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One call's arrays, of NumPy or JAX, hidden and head in one float dtype, labels int32."""

    kind: str
    hidden: Float[np.ndarray, "N D"]
    head: Float[np.ndarray, "V D"]
    labels: Int[np.ndarray, " N"]

    def __post_init__(self) -> None:
        n, d = self.hidden.shape
        v, head_d = self.head.shape
        if d != head_d or self.labels.shape != (n,):
            raise ValueError(
                f"hidden {self.hidden.shape}, head {self.head.shape} and labels "
                f"{self.labels.shape} do not fit; must be [N, D], [V, D] and [N]"
            )
        if not np.all((self.labels >= 0) & (self.labels < v)):
            raise ValueError(f"labels of {self.kind!r} lie outside [0, {v})")

    def case(self, name: str) -> Case:
        """The shapes of these inputs under a name."""
        n, d = self.hidden.shape
        return Case(name, n, d, self.head.shape[0])


def save(inputs: Inputs, path: pathlib.Path) -> None:
    """Writes an .npz file; numpy has no bfloat16, so such arrays are stored as their bits."""
    arrays = {"hidden": inputs.hidden, "head": inputs.head}
    bits = inputs.hidden.dtype == DTYPES["bfloat16"]
    if bits:
        arrays = {f"{name}_bfloat16": array.view(np.uint16) for name, array in arrays.items()}
    np.savez(path, labels=inputs.labels, kind=inputs.kind, **arrays)


def open_numpy(path: pathlib.Path) -> Any:
    """What `np.load` gives; ValueError names the path where that is none of NumPy's files."""
    try:
        return np.load(path)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of NumPy arrays, or a damaged one") from error


def load(path: pathlib.Path, dtype: str | None = None) -> Inputs:
    """Reads an .npz file with `hidden`, `head` and `labels`; float arrays are cast to `dtype`."""
    with open_numpy(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name in ("hidden", "head"):
        if (bits := arrays.pop(f"{name}_bfloat16", None)) is not None:
            arrays[name] = bits.view(DTYPES["bfloat16"])
    if missing := {"hidden", "head", "labels"} - arrays.keys():
        raise ValueError(f"{path} has no array named {', '.join(sorted(missing))}")
    kind = str(arrays.get("kind", path.stem))
    hidden, head = arrays["hidden"], arrays["head"]
    found = Arrays(hidden, head, arrays["labels"])
    return cast(kind, found, dtype or hidden.dtype.name)


def cast(kind: str, found: Arrays, dtype: str) -> Inputs:
    """Host arrays as inputs of one dtype, "bfloat16" or "float32"; ValueError for another."""
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; must be one of {', '.join(DTYPES)}")
    hidden, head, labels = (np.asarray(x) for x in found)
    return Inputs(
        kind,
        hidden.astype(DTYPES[dtype], copy=False),
        head.astype(DTYPES[dtype], copy=False),
        labels.astype(np.int32, copy=False),
    )
