"""Hidden states, head and labels to measure on, the same for every implementation and framework."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from benchmarks.cases import Case

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""hidden, head and labels."""

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


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


def make(kind: str, case: Case, dtype: str, seed: int = 0) -> Inputs:
    """Random inputs of a kind, one of `KINDS`, the same for the same seed."""
    if kind not in KINDS:
        raise ValueError(f"no inputs {kind!r}; must be {CHOICES}")
    hidden, head, labels = KINDS[kind](case, np.random.default_rng(seed))
    return _cast(kind, hidden, head, labels, dtype)


def flat(case: Case, rng: np.random.Generator) -> Arrays:
    """Logits of standard deviation 1, as of an untrained model: no class stands out."""
    hidden = rng.standard_normal((case.n, case.d), np.float32)
    head = rng.standard_normal((case.v, case.d), np.float32) / np.float32(np.sqrt(case.d))
    return hidden, head, rng.integers(0, case.v, case.n)


def peaked(case: Case, rng: np.random.Generator) -> Arrays:
    """Labels with Zipf's frequencies, each hidden state pointing at its label's row of the head.

    The label takes most of a token's probability, and nearly all other classes take none that
    matters. Real text is less tidy.
    """
    hidden, head, _ = flat(case, rng)
    frequency = 1 / np.arange(1, case.v + 1)
    labels = rng.permutation(case.v)[rng.choice(case.v, case.n, p=frequency / frequency.sum())]
    target = head[labels] / np.linalg.norm(head[labels], axis=1, keepdims=True)
    return hidden + np.float32(np.log(case.v) + 2) * target, head, labels


KINDS: dict[str, Callable[[Case, np.random.Generator], Arrays]] = {"flat": flat, "peaked": peaked}
CHOICES = f"one of {', '.join(KINDS)}, an .npz file or a folder of activations"
"""What `of` takes."""


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
    return _cast(kind, hidden, head, arrays["labels"], dtype or hidden.dtype.name)


def _cast(
    kind: str, hidden: np.ndarray, head: np.ndarray, labels: np.ndarray, dtype: str
) -> Inputs:
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; must be one of {', '.join(DTYPES)}")
    as_type = DTYPES[dtype]
    return Inputs(
        kind,
        hidden.astype(as_type, copy=False),
        head.astype(as_type, copy=False),
        labels.astype(np.int32, copy=False),
    )


def of(name: str, case: Case, dtype: str, seed: int = 0) -> Inputs:
    """Inputs by name for a case: a kind, or the path of real ones, cut to the case's N tokens.

    That is an .npz file, or a folder for `benchmarks.activations.read`, whose activations are
    lifted to the case's D. ValueError for a name that is neither, and for a file of another D or V
    or with fewer tokens.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        from benchmarks import activations  # only here, as it imports JAX

        hidden, head, labels = activations.read(path, n=case.n, v=case.v)
        if hidden.shape[1] != case.d:
            hidden, head = (activations.lift(np.asarray(x), case.d) for x in (hidden, head))
        inputs = _cast("real", *map(np.asarray, (hidden, head, labels)), dtype)
    elif path.suffix == ".npz":
        inputs = load(path, dtype)
    else:
        return make(name, case, dtype, seed)
    cut = dataclasses.replace(
        inputs, hidden=inputs.hidden[: case.n], labels=inputs.labels[: case.n]
    )
    if cut.case(case.name) != case:
        raise ValueError(f"{name} holds {inputs.case(inputs.kind)}, too little or not of {case}")
    return cut
