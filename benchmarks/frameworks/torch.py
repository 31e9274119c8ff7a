"""Runs of the loss in PyTorch."""

import os
import platform
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from benchmarks.implementations import IMPLEMENTATIONS, FrameworkName
from benchmarks.implementations.settings import Run
from benchmarks.inputs.arrays import DTYPES, Inputs
from benchmarks.measure.errors import Gradients
from benchmarks.measure.memory import ExtraMemory
from benchmarks.measure.runner import Prepared


class TorchFramework:
    """Holds the inputs on the first GPU, or else on the CPU.

    "fwd" is a training step's forward: hidden and head want gradients, so what the backward will
    need is kept (and most peers that fuse the head make their gradients there).
    """

    name: FrameworkName = "torch"

    def __init__(self, inputs: Inputs):
        self.version = f"torch {torch.__version__}"
        self.gpu = torch.cuda.is_available()
        self.device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        if self.gpu:
            self.device = torch.cuda.get_device_name()
        self.hidden = _tensor(inputs.hidden, self.gpu).requires_grad_()
        self.head = _tensor(inputs.head, self.gpu).requires_grad_()
        self.labels = _tensor(inputs.labels, self.gpu).long()

    def wait(self, result: Any) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def product(self) -> Any:
        with torch.no_grad():
            return self.hidden @ self.head.T

    def backend(self, run: Run) -> str:
        return run.implementation

    def ahead(self, runs: Iterable[Run]) -> None:
        """Nothing: compilation here is part of the first call."""

    def prepare(self, run: Run) -> Prepared:
        implementation = IMPLEMENTATIONS[run.implementation]
        arrays = self.hidden, self.head

        def call() -> Any:
            loss = implementation.loss(*arrays, self.labels, None, run.settings)
            if run.mode == "fwd":
                return (loss,)
            return loss, *torch.autograd.grad(loss, arrays)

        return Prepared(
            call=call,
            loss=lambda result: result[0].item(),
            gradients=lambda result: Gradients(*(x.float().cpu().numpy() for x in result[1:])),
            memory=self._memory(call),
        )

    def _memory(self, call: Any) -> ExtraMemory | None:
        """The allocator's peak over one call, after one that compiled; None on a CPU.

        Unlike XLA's analysis this counts what the forward kept for the backward as temporary.
        """
        call()
        if not self.gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        output = sum(tensor.numel() * tensor.element_size() for tensor in result)
        return ExtraMemory(temporary=peak - output, output=output)


def _tensor(array: np.ndarray, gpu: bool) -> torch.Tensor:
    if array.dtype == DTYPES["bfloat16"]:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.cuda() if gpu else tensor
