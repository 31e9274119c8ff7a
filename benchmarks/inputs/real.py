"""A real model's activations, read from files."""

import pathlib

import ml_dtypes
import numpy as np
from jaxtyping import Float

from benchmarks.inputs.arrays import Arrays, open_numpy

HIDDEN = "hidden.npy"


def read(folder: pathlib.Path, *, n: int | None = None, v: int | None = None) -> Arrays:
    """A real model's activations on the host, bfloat16, from a folder of .npy pieces.

    `hidden.npy` [N, D] uint16 holds bfloat16's bits, `labels.npy` [N] int32 the next tokens, and
    the head is Q8_0, what GGUF files store: `head_q0.npy`, `head_q1.npy`, … [rows, D] int8, in
    order, and `head_scales.npy` [V, D/32] float16, a value being q times its 32 columns' scale.
    `n` takes the first n tokens and `v` the first v classes; tokens whose label lies outside are
    left out. ValueError if the pieces do not fit or fewer than n tokens remain.
    """
    hidden = open_numpy(folder / HIDDEN).view(ml_dtypes.bfloat16)
    labels = open_numpy(folder / "labels.npy").astype(np.int32)
    scales = open_numpy(folder / "head_scales.npy")
    head = np.empty((len(scales), hidden.shape[1]), ml_dtypes.bfloat16)
    paths = sorted(folder.glob("head_q*.npy"), key=lambda path: int(path.stem[len("head_q") :]))
    row = 0
    for path in paths:
        q = open_numpy(path)
        stop = row + len(q)
        if q.shape[1] != head.shape[1] or q.shape[1] != 32 * scales.shape[1] or stop > len(head):
            raise ValueError(
                f"{path} {q.shape} does not fit hidden {hidden.shape} and scales {scales.shape}"
            )
        blocks = q.reshape(len(q), -1, 32) * scales[row:stop, :, None].astype(np.float32)
        head[row:stop] = blocks.reshape(q.shape)
        row = stop
    if row != len(head) or len(labels) != len(hidden):
        raise ValueError(
            f"{folder} holds {row} of {len(head)} head rows, {len(hidden)} hidden states and "
            f"{len(labels)} labels"
        )
    return first(Arrays(hidden, head, labels), folder, n=n, v=v)


def first(
    found: Arrays, path: pathlib.Path, *, n: int | None = None, v: int | None = None
) -> Arrays:
    """The first v classes and the first n tokens whose labels are among them, of what `path` held.

    ValueError if fewer than n tokens remain.
    """
    hidden, head, labels = found.hidden, found.head[:v], found.labels
    inside = np.flatnonzero((labels >= 0) & (labels < len(head)))[:n]
    if n is not None and len(inside) < n:
        raise ValueError(f"{path} has {len(inside)} tokens with labels < {len(head)}, not {n=}")
    return Arrays(hidden[inside], head, labels[inside])


def lift(x: Float[np.ndarray, "rows D"], d: int, *, seed: int = 0) -> Float[np.ndarray, "rows d"]:
    """x times one random [D, d] matrix with orthonormal rows, in x's dtype.

    Lifting hidden and head with the same seed leaves every logit what it was, up to rounding, and
    turns a small model's activations into a large one's shape. ValueError if d < D.
    """
    if d < x.shape[1]:
        raise ValueError(f"{d=} must be at least D={x.shape[1]}")
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, x.shape[1])))[0].T
    return (x.astype(np.float32) @ basis.astype(np.float32)).astype(x.dtype)


def lifted(found: Arrays, d: int) -> Arrays:
    """The same activations with D = d, hidden and head by `lift`."""
    if found.hidden.shape[1] == d:
        return found
    hidden, head = (lift(np.asarray(x), d) for x in (found.hidden, found.head))
    return Arrays(hidden, head, found.labels)
