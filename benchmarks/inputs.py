"""Hidden states, head and labels to measure on, the same for every implementation and framework."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from benchmarks.cases import Case, find

KINDS = ("flat", "peaked")
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One call's arrays on the host, hidden and head in one float dtype, labels int32."""

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
    """Random inputs of a kind.

    "flat": logits of standard deviation 1, an untrained model: no class stands out. "peaked":
    labels with Zipf's frequencies, each hidden state pointing at its label's row so that the
    label takes most of the probability and nearly all other classes take none that matters.
    """
    if kind not in KINDS:
        raise ValueError(f"no inputs {kind!r}; must be one of {', '.join(KINDS)}, or an .npz file")
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((case.n, case.d), np.float32)
    head = rng.standard_normal((case.v, case.d), np.float32) / np.float32(np.sqrt(case.d))
    if kind == "flat":
        labels = rng.integers(0, case.v, case.n)
    else:
        frequency = 1 / np.arange(1, case.v + 1)
        labels = rng.permutation(case.v)[rng.choice(case.v, case.n, p=frequency / frequency.sum())]
        target = head[labels] / np.linalg.norm(head[labels], axis=1, keepdims=True)
        hidden += np.float32(np.log(case.v) + 2) * target
    return _cast(kind, hidden, head, labels, dtype)


def save(inputs: Inputs, path: pathlib.Path) -> None:
    """Writes an .npz file; numpy has no bfloat16, so such arrays are stored as their bits."""
    arrays = {"hidden": inputs.hidden, "head": inputs.head}
    bits = inputs.hidden.dtype == DTYPES["bfloat16"]
    if bits:
        arrays = {f"{name}_bfloat16": array.view(np.uint16) for name, array in arrays.items()}
    np.savez(path, labels=inputs.labels, kind=inputs.kind, **arrays)


def load(path: pathlib.Path, dtype: str | None = None) -> Inputs:
    """Reads an .npz file with `hidden`, `head` and `labels`; float arrays are cast to `dtype`."""
    with np.load(path) as file:
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


def of(name: str, case_name: str, dtype: str, *, n: int | None = None, seed: int = 0) -> Inputs:
    """Inputs by name: a kind, made for a case, or the path of an .npz file of that case's D and V.

    `n` replaces the case's number of tokens; of a file it takes the first `n`. ValueError for
    names that are neither, and for a file of other shapes than the case's.
    """
    case = find(case_name, n)
    if not name.endswith(".npz"):
        return make(name, case, dtype, seed)
    inputs = load(pathlib.Path(name), dtype)
    if n is not None:
        inputs = dataclasses.replace(inputs, hidden=inputs.hidden[:n], labels=inputs.labels[:n])
    shape = inputs.case(case_name)
    if (shape.d, shape.v) != (case.d, case.v) or (n is not None and shape.n != n):
        raise ValueError(f"{name} holds {shape}, which does not fit {case}")
    return inputs
