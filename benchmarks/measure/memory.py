"""The memory a compiled program needs beyond its arguments, from the compiler's own analysis."""

import dataclasses
from typing import Any

MB = 2**20
"""Bytes in a MB, as the papers on this loss count them."""


@dataclasses.dataclass(frozen=True)
class ExtraMemory:
    """Bytes: `temporary` lives only during the call, `output` is what it hands back.

    The output of a training step's loss is unavoidable: the gradients have the size of hidden and
    head. The temporaries are the implementation's own doing.
    """

    temporary: int
    output: int

    @property
    def temporary_mb(self) -> float:
        return self.temporary / MB

    @property
    def output_mb(self) -> float:
        return self.output / MB

    @property
    def mb(self) -> float:
        """Both together, in MB."""
        return self.temporary_mb + self.output_mb


def extra_memory(compiled: Any) -> ExtraMemory:
    """Extra memory of `jax.jit(f).lower(...).compile()`.

    The temporaries are XLA's planned peak of all buffers that are neither argument nor output;
    outputs written into donated arguments cost nothing and are left out. Nothing is run.
    """
    analysis = compiled.memory_analysis()
    return ExtraMemory(
        temporary=int(analysis.temp_size_in_bytes),
        output=int(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
    )
