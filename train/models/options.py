"""The flags of the model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from train.flags import require_share, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it computes."""

    model: Annotated[str, shown("NAME|FOLDER|FILE.gguf")] = "tiny"
    """nano, tiny or small, from scratch; smollm2-135m or gemma3-270m from their packages; a Hugging
    Face folder or a GGUF file of a Llama, Mistral, Gemma or Qwen; hf:org/name."""
    template: Annotated[str, shown("NAME")] = "auto"
    """Chat template: auto is the model's own, or its family's, or alpaca's; chatml, llama3, gemma,
    mistral, alpaca, plain."""
    dropout: Annotated[float, shown("P")] = 0.1
    """Probability of dropping a feature after the embedding and each attention and MLP."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of activations and matmuls: auto is bfloat16 but on a CPU. The loss is float32 with
    either; weights see below."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Of weights and the optimizer's moments. bfloat16 halves their memory; they are then rounded
    up or down by chance, so that small updates count."""
    remat: Literal["none", "block", "full"] = "none"
    """What the backward pass computes again to save memory: nothing, each block from its input, or
    groups of about √layers blocks from theirs. Up to a third more time."""

    def __post_init__(self) -> None:
        require_share("dropout", self.dropout)
