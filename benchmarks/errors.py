"""How far an implementation's gradients are from exact ones."""

import functools
import pathlib
from typing import NamedTuple

import numpy as np

from benchmarks.inputs import Inputs
from benchmarks.settings import Settings


class Gradients(NamedTuple):
    """dE [N, D] and dC [V, D] of the mean loss, on the host."""

    hidden: np.ndarray
    head: np.ndarray


def relative_error(gradient: np.ndarray, reference: np.ndarray) -> float:
    """‖gradient − reference‖ / ‖reference‖ in Frobenius norms, by blocks of rows in float32."""
    difference = norm = 0.0
    for start in range(0, len(reference), 4096):
        block = reference[start : start + 4096].astype(np.float32)
        rows = gradient[start : start + 4096].astype(np.float32)
        difference += float(np.sum(np.square(rows - block), dtype=np.float64))
        norm += float(np.sum(np.square(block), dtype=np.float64))
    return float(np.sqrt(difference / norm))


class Reference:
    """Gradients of the same (already rounded) inputs in full float32, without any filter.

    They are computed in JAX where `compute` allows it, once for each β and softcap, and kept in a
    folder for the processes that come after.
    """

    def __init__(self, folder: pathlib.Path, inputs: Inputs, *, compute: bool):
        self.folder = folder
        self.inputs = inputs
        self.compute = compute

    def __call__(self, settings: Settings) -> Gradients | None:
        """The gradients under a β and softcap; None where nobody has computed them."""
        return self._load(settings.label_smoothing, settings.softcap)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one reference lives as long as its process
    def _load(self, label_smoothing: float, softcap: float | None) -> Gradients | None:
        path = self.folder / f"reference-{label_smoothing}-{softcap}.npz"
        if path.exists():
            with np.load(path) as file:
                return Gradients(file["hidden"], file["head"])
        if not self.compute:
            return None
        gradients = exact_gradients(self.inputs, label_smoothing, softcap)
        np.savez(path, **gradients._asdict())
        return gradients


def exact_gradients(inputs: Inputs, label_smoothing: float, softcap: float | None) -> Gradients:
    """Gradients of the chunked backend in float32 from float32 copies of the inputs."""
    import jax

    import lsce

    def loss(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
        return lsce.linear_cross_entropy(
            hidden,
            head,
            labels,
            label_smoothing=label_smoothing,
            softcap=softcap,
            gradient_filter=None,
            implementation="chunked",
        )

    arrays = [array.astype(np.float32) for array in (inputs.hidden, inputs.head)]
    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays, inputs.labels)
    return Gradients(*map(np.asarray, gradients))
