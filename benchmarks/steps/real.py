"""A model with its weights and text of a user's, in place of random ones, for a step of JAX's.

How long the loss takes depends on them: its filter keeps what has a probability, and where weights
are random every token has some (`lsce.sparse.filter`). PyTorch's step takes as long for any.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from benchmarks.steps.variant import Variant
from train.data import dataset
from train.models import resolve
from train.models.config import ModelConfig
from train.run.state import TrainState, first_state


@dataclasses.dataclass(frozen=True, eq=False)
class Real:
    """A checkpoint, and records that are packed as the trainer packs."""

    checkpoint: resolve.Pretrained
    data: pathlib.Path

    @classmethod
    def find(cls, name: str, data: pathlib.Path) -> "Real":
        found = resolve.find(name)
        if isinstance(found, ModelConfig):
            raise ValueError(f"--checkpoint {name}: its weights are random")
        if not data.is_file():
            raise ValueError(f"--data {data}: there is no such file")
        return cls(found, data)

    def shape(self, asked: ModelConfig) -> ModelConfig:
        """The checkpoint's shape, computed as asked. ValueError if it is another's."""
        own = self.checkpoint.config
        for name in ("vocab_size", "hidden_size", "layers"):
            mine, other = getattr(own, name), getattr(asked, name)
            if mine != other:
                raise ValueError(f"the checkpoint's {name} is {mine}, not --model's {other}")
        return dataclasses.replace(
            own, dtype=asked.dtype, remat=asked.remat, scan=asked.scan, attention=asked.attention
        )

    def batch(self, variant: Variant, length: int) -> dict[str, Int[np.ndarray, "B _"]]:
        return _first_batch(self, variant.rows * variant.accumulate, length)

    def state(self, create: Callable[[int], TrainState], on: Mesh | None) -> TrainState:
        return first_state(self.checkpoint, create, 0, on)


@functools.cache
def _first_batch(real: Real, rows: int, length: int) -> dict[str, Int[np.ndarray, "B _"]]:
    found = dataset.build(
        data=[real.data],
        held_out=0.0,
        max_length=length,
        batch_size=rows,
        vocab_size=real.checkpoint.config.vocab_size,
        tokenizer=real.checkpoint.tokenizer(),
        seed=0,
    )
    return dict(next(found.train))
