"""Hidden states, head and labels to measure on, the same for every implementation and framework."""

import dataclasses
import pathlib

from benchmarks.inputs import arrays, random, real
from benchmarks.inputs.arrays import Inputs
from benchmarks.inputs.cases import Case

CHOICES = f"one of {', '.join(random.KINDS)}, an .npz file or a folder of activations"
"""What `named` takes."""


def named(name: str, case: Case, dtype: str, seed: int = 0) -> Inputs:
    """Inputs by name for a case: a kind, or the path of real ones, cut to the case's N tokens.

    That is an .npz file, or a folder for `real.read`, whose activations are lifted to the case's D.
    ValueError for a name that is neither, and for a file of another D or V or with fewer tokens.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        found = arrays.cast("real", real.lifted(real.read(path, n=case.n, v=case.v), case.d), dtype)
    elif path.suffix == ".npz":
        found = arrays.load(path, dtype)
    elif name in random.KINDS:
        return random.make(name, case, dtype, seed)
    else:
        raise ValueError(f"no inputs {name!r}; must be {CHOICES}")
    cut = dataclasses.replace(found, hidden=found.hidden[: case.n], labels=found.labels[: case.n])
    if cut.case(case.name) != case:
        raise ValueError(f"{name} holds {found.case(found.kind)}, too little or not of {case}")
    return cut
