"""What is measured: a model's shape, the rows it trains on, and how its step is computed."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from train.data.packing import IGNORE, pack
from train.models.config import PRESETS, ModelConfig, Rope
from train.run.options import LossOptions, MeshShape
from train.text.tokenizer import Example

LLAMA_1B = ModelConfig(
    vocab_size=128_256,
    hidden_size=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_size=64,
    mlp_size=8192,
    rope=Rope(5e5, "llama3", factor=32.0),
)
GEMMA_2B = ModelConfig(
    vocab_size=256_000,
    hidden_size=2304,
    layers=26,
    heads=8,
    kv_heads=4,
    head_size=256,
    mlp_size=9216,
    model_type="gemma2",
    window=4096,
    sliding=(True, False) * 13,
    query_scale=256**-0.5,
    attention_softcap=50.0,
    final_softcap=30.0,
    post_norms=True,
    zero_centred_norms=True,
    activation="gelu_tanh",
    scaled_embedding=True,
    norm_epsilon=1e-6,
)
SHAPES = {
    **{name: PRESETS[name] for name in ("nano", "smollm2-135m", "gemma3-270m")},
    "llama3.2-1b": LLAMA_1B,
    "gemma2-2b": GEMMA_2B,
}
"""Models by name; nano is for a look on a CPU."""

Segments = Literal["packed", "masked", "one"]
"""Rows packed from examples of 130 tokens in the mean, their starts handed over or kept back, or
rows of one example each."""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, by a part of the device's name."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row to measure; of PyTorch by `OF_TORCH` alone, of JAX by all but `compiled`."""

    framework: Literal["jax", "torch"] = "jax"
    rows: int = 16
    segments: Segments = "packed"
    loss: str = "auto"
    """JAX: "naive", which is optax's on whole logits, or what `--implementation` of the trainer
    takes. PyTorch: "full" (the model's own, on whole logits) or an implementation of `benchmarks`
    on its last hidden states."""
    filter: str = "fp8"
    """The trainer's --gradient-filter."""
    beta: float = 0.1
    remat: Literal["none", "block", "full"] = "none"
    scan: Literal["auto", "on", "off"] = "auto"
    """auto: layers written out where the trainer does so, which is on a GPU."""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    bits: Literal["repeatable", "excluded", "tuned"] = "repeatable"
    """Options of the compilation: the trainer's; `xla_gpu_exclude_nondeterministic_ops`, which
    still times and chooses; none (`--autotune`)."""
    accumulate: int = 1
    mesh: str = ""
    """JAX: the trainer's --mesh, its axes joined by "+": "fsdp=2", "data=2+fsdp=2"; "" is one
    device. `rows` are those of all devices."""
    layers: int | None = None
    """Fewer than the model's, to see what a layer costs."""
    compiled: bool = True
    """PyTorch: with torch.compile."""
    flags: str = ""
    """Further options of XLA's, as name=value joined by ";"."""

    @property
    def devices(self) -> MeshShape:
        return MeshShape.read(self.mesh.replace("+", ",") or "data=1")

    def __str__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name != "framework" and getattr(self, field.name) != field.default
        )
        return " ".join([self.framework, *changed])


OF_TORCH = ("framework", "rows", "segments", "loss", "beta", "layers", "compiled")
"""What makes a difference to PyTorch's step."""


def read(text: str) -> Variant:
    """Reads "rows=32,segments=one"; "torch,rows=32" for a peer. ValueError for what it is not."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = "framework", part
        field = Variant.__dataclass_fields__.get(name)
        if field is None:
            raise ValueError(f"{text}: no {name!r}; must be {', '.join(Variant.__annotations__)}")
        choices = get_args(field.type)
        if field.type is bool:
            choices, value = (True, False), {"true": True, "false": False}.get(value, value)
        elif field.type in (int, int | None):
            if not value.isdecimal() or not (value := int(value)):
                raise ValueError(f"{text}: {name} must be a whole number above 0")
        elif field.type is float:
            value = float(value)
        if field.type not in (int, int | None) and choices and value not in choices:
            raise ValueError(f"{text}: {name} must be one of {', '.join(map(str, choices))}")
        if name == "filter":
            LossOptions(gradient_filter=str(value))  # ValueError for what it is not
        if name == "mesh":
            MeshShape.read(part.partition("=")[2].replace("+", ","))
        values[name] = value
    found = Variant(**values)
    for name in values:  # or a row would say what it is not of
        if name == "compiled" if found.framework == "jax" else name not in OF_TORCH:
            raise ValueError(f"{text}: {name} makes no difference to {found.framework}")
    if found.loss == "naive" and "filter" in values:
        raise ValueError(f"{text}: filter makes no difference to loss=naive")
    return found


def shape_of(model: str, variant: Variant) -> ModelConfig:
    shape = SHAPES[model]
    layers = variant.layers or shape.layers
    return dataclasses.replace(
        shape,
        layers=layers,
        sliding=shape.sliding[:layers],
        dtype="bfloat16",
        remat=variant.remat,
        scan="off" if variant.scan == "off" else "on",
        attention=variant.attention,
    )


def batch_of(
    shape: ModelConfig, variant: Variant, length: int
) -> dict[str, Int[np.ndarray, "B _"]]:
    """Rows · accumulate rows of tokens with Zipf's frequencies, packed as the trainer packs."""
    random = np.random.default_rng(0)
    rows = variant.rows * variant.accumulate

    def sizes() -> Iterator[int]:
        left = rows * length * 5 // 4
        while left > 0:
            size = length if variant.segments == "one" else int(random.lognormal(4.6, 0.7)) + 8
            yield min(size, length)
            left -= size

    def example(size: int) -> Example:
        tokens = np.minimum(random.zipf(1.2, size), shape.vocab_size) - 1
        return Example(tokens.astype(np.int32), np.ones(size, bool))

    packed = pack([example(size) for size in sizes()], length)
    batch = packed[random.permutation(len(packed))[:rows]]
    if variant.segments == "masked":
        del batch["starts"]
    return batch


def flops_per_token(shape: ModelConfig, segments: Int[np.ndarray, "B T"]) -> float:
    """Operations that a step has to make for each token.

    6 for each weight of a matrix product, the head counted once whether tied or not, embeddings and
    norms not; and 12 · heads · H for each key that a token sees. What is recomputed is not counted,
    nor are keys of other segments.
    """
    inner, shared = (n * shape.head_size for n in (shape.heads, shape.kv_heads))
    weights = shape.hidden_size * (2 * inner + 2 * shared + 3 * shape.mlp_size)
    length = segments.shape[1]
    at = np.arange(length)
    distance = at[:, None] - at[None]

    @functools.cache
    def keys(window: int | None) -> float:
        near = (distance >= 0) & (distance < (window or length))
        seen = sum(int(np.sum((row[:, None] == row) & near)) for row in segments)
        return seen / segments.size

    seen = sum(keys(kind.window) for kind in shape.kinds)
    products = shape.layers * weights + shape.vocab_size * shape.hidden_size
    return 6.0 * products + 12.0 * shape.heads * shape.head_size * seen


def labelled(batch: dict[str, Int[np.ndarray, "B _"]]) -> int:
    return int(np.count_nonzero(batch["labels"] != IGNORE))
