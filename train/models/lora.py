"""LoRA: x·W becomes x·W + s·(x·A)·B with s = alpha / rank. A and B are trained, W stays.

A is drawn and B is 0, so that a model with new adapters computes what it computes without. In
training features of the x that A reads may be dropped; W reads all of them.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from train.models.config import COLUMNS, Lora, ModelConfig

Path = tuple[str, ...]


class Adapter(nnx.Module):
    """s·(x·A)·B; `stack` are leading axes of both, as of layers."""

    key: PRNGKeyArray | None = None
    """Draws the features of x that are dropped; None, as in evaluation, for none of them."""

    def __init__(self, lora: Lora, size: int, out_size: int, *stack: int, rngs: nnx.Rngs) -> None:
        self.scale = lora.scale
        self.dropout = nnx.Dropout(lora.dropout)
        # Uniform up to 1/√size, as PEFT draws it.
        init = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(stack)))
        )
        self.a = nnx.Param(init(rngs.params(), (*stack, size, lora.rank)))
        self.b = nnx.Param(jnp.zeros((*stack, lora.rank, out_size)))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        return self.down(x) @ self.up(x.dtype)

    def down(self, x: Float[Array, "*N D"]) -> Float[Array, "*N R"]:
        """x·A."""

        def product(x: Float[Array, "*N D"], a: Float[Array, "D R"]) -> Float[Array, "*N R"]:
            return self.dropout(x, deterministic=self.key is None, rngs=self.key) @ a

        if self.key is not None:  # what is left of x is drawn again, and not kept beside x
            product = jax.checkpoint(product, prevent_cse=False)
        return product(x, self.a[...].astype(x.dtype))

    def up(self, dtype: jnp.dtype) -> Float[Array, "R F"]:
        """s·B, rounded once."""
        return (self.scale * self.b[...]).astype(dtype)


class HeadAdapter(Adapter):
    """logits = h·Cᵀ + s·(h·A)·B as one product, [h, h·A]·[C, s·Bᵀ]ᵀ: more columns of a head.

    So the loss sees a head like any other. Zeros fill both up to a multiple of `COLUMNS`.
    """

    def hidden(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N C"]:
        return _filled(jnp.concatenate([hidden, self.down(hidden)], axis=-1))

    def head(self, head: Float[Array, "V D"]) -> Float[Array, "V C"]:
        return _filled(jnp.concatenate([head, self.up(head.dtype).T], axis=-1))


def _filled(x: Float[Array, "*N D"]) -> Float[Array, "*N C"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % COLUMNS)])


def with_dropout[M: nnx.Module](module: M, key: PRNGKeyArray | None) -> M:
    """The module whose adapters drop features of what they read, each its own; without a key none.

    That is a copy, as keys are of one call.
    """
    if key is None:
        return module
    copy = nnx.merge(*nnx.split(module))
    parts = [part for _, part in nnx.iter_modules(copy)]
    adapters = [part for part in parts if isinstance(part, Adapter) and part.dropout.rate > 0]
    for adapter, own in zip(adapters, jax.random.split(key, len(adapters)), strict=True):
        adapter.key = own
    return copy


def matrices(lora: Lora, flat: dict[Any, Any]) -> dict[str, tuple[Path, Any, Any]]:
    """For each target the path of its W, then A and B, out of a flat state; they leave it."""
    found = {}
    for name in lora.targets:
        module = ("blocks", *name.split("."))
        where = ("head_adapter",) if name == "head" else (*module, "adapter")
        weight = ("untied_head",) if name == "head" else (*module, "kernel")
        found[name] = weight, flat.pop((*where, "a")), flat.pop((*where, "b"))
    return found


def merged(config: ModelConfig, params: nnx.State) -> tuple[ModelConfig, nnx.State]:
    """The model without adapters that computes the same: W + s·A·B in place of W, float32.

    A head that was the embedding table becomes one of its own, as the table stays what it is.
    """
    assert config.lora is not None
    flat = dict(nnx.to_flat_state(params))
    for path, a, b in matrices(config.lora, flat).values():
        weight = flat.get(path, flat[("embedding", "embedding")])
        added = config.lora.scale * jnp.matmul(a[...], b[...], precision=jax.lax.Precision.HIGHEST)
        added = added.T if path == ("untied_head",) else added
        flat[path] = weight.replace(weight[...].astype(jnp.float32) + added)
    tied = config.tied_head and "head" not in config.lora.targets
    config = dataclasses.replace(config, lora=None, tied_head=tied)
    return config, nnx.from_flat_state(flat)
