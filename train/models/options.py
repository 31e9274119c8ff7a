"""The flags of the model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from train.flags import require, require_share, shown
from train.models.config import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it computes."""

    model: Annotated[str, shown(f"{{{','.join(PRESETS)}}}")] = "tiny"
    """Shape of the model."""
    dropout: Annotated[float, shown("P")] = 0.1
    """Probability of dropping a feature after the embedding and each attention and MLP."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmuls. Weights, optimizer and loss are float32 with either."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        require(
            self.model in PRESETS, f"--model must be one of {', '.join(PRESETS)}, not {self.model}"
        )
        require_share("dropout", self.dropout)
