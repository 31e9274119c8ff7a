"""What a file of weights offers, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

LFS = b"version https://git-lfs"


class Tensors(Protocol):
    """The named tensors of a file, or of several that belong together. Reading maps, not loads."""

    @property
    def path(self) -> Path:
        """What to name in a message."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtype(self) -> str:
        """The narrowest that holds every tensor exactly: bfloat16, float16 or float32."""
        ...

    @property
    def narrower(self) -> Mapping[str, str]:
        """The dtypes of tensors that have another, by name."""
        ...

    def file_of(self, name: str) -> Path:
        """Where a tensor is, for messages."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, in a floating dtype."""
        ...


def broken(path: Path, error: Exception) -> ValueError:
    """What to raise for a file that its library cannot read."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            return ValueError(
                f"{path} is a pointer of Git LFS and not the weights: run `git lfs pull` there"
            )
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
    return ValueError(f"{path} is truncated or corrupt: {reason}")
