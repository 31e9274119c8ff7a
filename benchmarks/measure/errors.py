"""How far an implementation's gradients are from exact ones."""

import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.implementations.settings import Settings
from benchmarks.inputs.arrays import Inputs


class Gradients(NamedTuple):
    """dE [N, D] and dC [V, D] of the mean loss: NumPy's arrays, or JAX's on its device."""

    hidden: Any
    head: Any


def relative_error(gradient: Any, reference: Any) -> float:
    """‖gradient − reference‖ / ‖reference‖ in Frobenius norms.

    By blocks of rows in float32, wherever the arrays are.
    """
    difference = norm = 0.0
    for start in range(0, len(reference), 4096):
        block = reference[start : start + 4096].astype(np.float32)
        rows = gradient[start : start + 4096].astype(np.float32)
        difference += float(((rows - block) ** 2).sum())
        norm += float((block**2).sum())
    return float(np.sqrt(difference / norm))


class Reference:
    """Gradients of the same (already rounded) inputs in full float32, without any filter.

    They are computed in JAX where `compute` allows it, once for each β and softcap, and with `keep`
    left in the folder, if there is one, for the processes that come after.
    """

    def __init__(
        self, folder: pathlib.Path | None, inputs: Inputs, *, compute: bool, keep: bool = True
    ):
        self.folder = folder
        self.inputs = inputs
        self.compute = compute
        self.keep = keep

    def __call__(self, settings: Settings) -> Gradients | None:
        """The gradients under a β and softcap; None where nobody has computed them."""
        return self._load(settings.label_smoothing, settings.softcap)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one reference lives as long as its process
    def _load(self, label_smoothing: float, softcap: float | None) -> Gradients | None:
        path = self.folder and self.folder / f"reference-{label_smoothing}-{softcap}.npz"
        if path and path.exists():
            with np.load(path) as file:
                return Gradients(file["hidden"], file["head"])
        if not self.compute:
            return None
        gradients = exact_gradients(self.inputs, label_smoothing, softcap)
        if path and self.keep:
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
    # Run once, so that to look for the fastest float32 products takes longer than a slow one.
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    with jax.default_matmul_precision("highest"):
        grad = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options)
        gradients = grad(*arrays, inputs.labels)
    return Gradients(*gradients)
