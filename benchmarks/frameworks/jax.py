"""Runs of the loss in JAX."""

import concurrent.futures
import functools
import os
import platform
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lsce
from benchmarks.implementations import IMPLEMENTATIONS, FrameworkName
from benchmarks.implementations.settings import Run, Settings
from benchmarks.inputs.arrays import Inputs
from benchmarks.measure import timing
from benchmarks.measure.errors import Gradients
from benchmarks.measure.memory import extra_memory
from benchmarks.measure.runner import Prepared


def check_devices(count: int, n: int) -> None:
    """ValueError where N tokens cannot be split over that many devices of this machine."""
    if count > jax.local_device_count():
        raise ValueError(f"{count} devices asked for; this machine has {jax.local_device_count()}")
    if n % count:
        raise ValueError(f"{n} tokens cannot be split evenly over {count} devices")


class JaxFramework:
    """Holds the inputs on JAX's first devices: the tokens split over them, the head on each.

    `devices` has been checked by `check_devices`.
    """

    name: FrameworkName = "jax"

    def __init__(self, inputs: Inputs, devices: int = 1):
        used = jax.local_devices()[:devices]
        self.version = f"jax {jax.__version__}"
        self.device = used[0].device_kind
        if used[0].platform == "cpu":
            self.device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        split = whole = used[0]
        if devices > 1:
            self.device = f"{devices} × {self.device}"
            mesh = jax.make_mesh((devices,), ("tokens",), axis_types=(AxisType.Auto,), devices=used)
            split = NamedSharding(mesh, PartitionSpec("tokens"))
            whole = NamedSharding(mesh, PartitionSpec())
        arrays = inputs.hidden, inputs.head, inputs.labels
        self.arrays = jax.device_put(arrays, (split, whole, split))
        self._product = timing.product(*self.arrays[:2])
        self._ahead: dict[Run, concurrent.futures.Future[Prepared]] = {}

    def wait(self, result: Any) -> None:
        jax.block_until_ready(result)

    def product(self) -> Any:
        return self._product()

    def backend(self, run: Run) -> str:
        choose = IMPLEMENTATIONS[run.implementation].backend
        if choose is None:
            return run.implementation
        return choose(*self._arguments(run.settings), run.settings)

    def ahead(self, runs: Iterable[Run]) -> None:
        """Compiles this library's runs side by side; the rest XLA tunes by timing, so alone."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for run in runs:
                if (
                    IMPLEMENTATIONS[run.implementation].backend is not None
                    and run not in self._ahead
                ):
                    self._ahead[run] = pool.submit(self._prepare, run)

    def prepare(self, run: Run) -> Prepared:
        future = self._ahead.pop(run, None)
        return self._prepare(run) if future is None else future.result()

    def _prepare(self, run: Run) -> Prepared:
        implementation, settings = IMPLEMENTATIONS[run.implementation], run.settings
        arrays = self._arguments(settings)

        def loss(hidden: Any, head: Any, labels: Any, order: Any) -> Any:
            return implementation.loss(hidden, head, labels, order, settings)

        def loss_and_gradients(*arrays: Any) -> Any:
            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=settings.stats)(*arrays)

        function = loss if run.mode == "fwd" else loss_and_gradients
        compiled = jax.jit(function).lower(*arrays).compile()
        return Prepared(
            call=lambda: compiled(*arrays),
            # The loss comes first, whatever statistics or gradients follow it.
            loss=lambda result: float(jax.tree.leaves(result)[0]),
            gradients=lambda result: Gradients(*result[1]),
            memory=extra_memory(compiled),
        )

    def _arguments(self, settings: Settings) -> Any:
        return (*self.arrays, self._order if settings.vocab_order else None)

    @functools.cached_property
    def _order(self) -> Any:
        hidden, head, _ = self.arrays
        mean = hidden.astype(jnp.float32).mean(0).astype(head.dtype)
        return lsce.vocabulary_order((head @ mean).astype(jnp.float32))
