"""QuACK: chunks of tokens, gradients made in the forward, by kernels for Hopper in the CuTe DSL.

exp(z − k), k a power of two a row and a tile, takes the place of the chunk's logits; both products
of the gradients scale it as they read it. dC is summed in float32.
"""

import functools
import importlib
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings

CHUNK = 4096
"""Tokens: its default."""


def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module("quack.linear_cross_entropy")
    if not library.scaled_exp_lce_supported(hidden, head, CHUNK, "mean"):
        # It would take its older kernels, which write the logits, and the row would not say so.
        raise ValueError("its fused kernels take bfloat16 on Hopper, V % 128 = 0 and D % 8 = 0")
    return library.chunked_linear_cross_entropy(hidden, head, labels, chunk_size=CHUNK)


IMPLEMENTATION = Implementation(
    "quack",
    "torch",
    loss,
    functools.partial(unsupported, supported=("exact",)),
    ("quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi"),
)
