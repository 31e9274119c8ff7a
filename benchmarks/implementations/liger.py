"""Liger: chunks of tokens, gradients made in the forward, by Triton kernels; and its newer paths.

`IMPLEMENTATION` is what `LigerFusedLinearCrossEntropyLoss` runs on every NVIDIA GPU. A chunk's
logits take no more room there than the hidden states do, which at a large vocabulary makes many
small chunks; `CHUNKS` is the same with 16 times that room. Three more are for Hopper, in NVIDIA's
CuTe DSL:

- `CUTE` keeps the chunks and replaces the kernel on their logits;
- `FLCE` holds all logits at once, and has no options;
- `FLSCE` ("scaled" cross entropy) keeps no logits and makes them again in the backward, as we do.

Each is called where it is defined: behind Liger's own dispatch a GPU or a shape that it does not
take would get another kernel, and a row that says what it is not.
"""

import functools
import importlib
from typing import Any

from benchmarks.implementations.implementation import Implementation, unsupported
from benchmarks.implementations.settings import Settings

PACKAGES = ("liger-kernel",)
CUTE_PACKAGES = (*PACKAGES, "nvidia-cutlass-dsl", "apache-tvm-ffi")
ROOM = 16
"""Room for the logits of a chunk in `CHUNKS`, in hidden states [N, D]."""


def loss(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module("liger_kernel.transformers")
    module = library.LigerFusedLinearCrossEntropyLoss(
        label_smoothing=settings.label_smoothing, softcap=settings.softcap
    )
    return module(head, hidden, labels)


def in_larger_chunks(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module("liger_kernel.transformers.functional")
    return library.liger_fused_linear_cross_entropy(
        hidden,
        head,
        labels,
        label_smoothing=settings.label_smoothing,
        softcap=settings.softcap,
        chunk_mem_const=ROOM,
    )


def by_cute_in_chunks(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module("liger_kernel.functional")
    mean, *_ = library.fused_linear_cross_entropy(
        hidden,
        head,
        labels,
        label_smoothing=settings.label_smoothing,
        softcap=settings.softcap,
        impl="nvidia-cutedsl",
    )
    return mean


def by_cute(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module(
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
    )
    return library.liger_fused_linear_cross_entropy_sm90(hidden, head, labels)


def by_cute_scaled(hidden: Any, head: Any, labels: Any, order: Any, settings: Settings) -> Any:
    library = importlib.import_module(
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    )
    # A loss a token, whose mean is autograd's: the temperature that its name tells of stays 1.
    return library.LigerFusedScaledCrossEntropySM90Function.apply(hidden, head, labels).mean()


_with_options = functools.partial(unsupported, supported=("smoothing", "softcap", "exact"))
_without = functools.partial(unsupported, supported=("exact",))
IMPLEMENTATION = Implementation("liger", "torch", loss, _with_options, PACKAGES)
CHUNKS = Implementation("liger-chunks", "torch", in_larger_chunks, _with_options, PACKAGES)
CUTE = Implementation("liger-cute", "torch", by_cute_in_chunks, _with_options, CUTE_PACKAGES)
FLCE = Implementation("liger-flce", "torch", by_cute, _without, CUTE_PACKAGES)
FLSCE = Implementation("liger-flsce", "torch", by_cute_scaled, _without, CUTE_PACKAGES)
