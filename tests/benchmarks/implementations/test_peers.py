"""Peers that no test can install: what each is asked to do, and what it is never asked."""

import importlib
import types
from typing import Any

import pytest

from benchmarks import table
from benchmarks.implementations import IMPLEMENTATIONS, quack
from benchmarks.implementations.settings import Settings

SETTINGS = Settings(label_smoothing=0.1, softcap=30.0)
CALLS = {
    "liger-chunks": (
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        {"label_smoothing": 0.1, "softcap": 30.0, "chunk_mem_const": 16},
    ),
    "liger-cute": (
        "liger_kernel.functional",
        "fused_linear_cross_entropy",
        {"label_smoothing": 0.1, "softcap": 30.0, "impl": "nvidia-cutedsl"},
    ),
    "liger-flce": (
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "liger_fused_linear_cross_entropy_sm90",
        {},
    ),
    "fla": (
        "fla.modules.fused_linear_cross_entropy",
        "fused_linear_cross_entropy_loss",
        {"label_smoothing": 0.1, "logit_softcapping": 30.0, "accumulate_grad_in_fp32": True},
    ),
    "fla-bfloat16": (
        "fla.modules.fused_linear_cross_entropy",
        "fused_linear_cross_entropy_loss",
        {"label_smoothing": 0.1, "logit_softcapping": 30.0, "accumulate_grad_in_fp32": False},
    ),
}


def asked(monkeypatch: pytest.MonkeyPatch, name: str, module: str, **functions: Any) -> Any:
    """Calls the loss of the implementation with a library of these functions in its place."""

    def found(wanted: str) -> types.SimpleNamespace:
        assert wanted == module
        return types.SimpleNamespace(**functions)

    monkeypatch.setattr(importlib, "import_module", found)
    return IMPLEMENTATIONS[name].loss("E", "C", "y", None, SETTINGS)


@pytest.mark.parametrize("name", CALLS)
def test_each_row_is_of_the_kernels_that_it_names(name: str, monkeypatch: pytest.MonkeyPatch):
    module, function, options = CALLS[name]

    def called(*arrays: str, **given: Any):
        places = ("E", "y", "C") if name.startswith("fla") else ("E", "C", "y")
        assert (arrays, given) == (places, options)
        return ("loss", None, None, None) if name == "liger-cute" else "loss"

    assert asked(monkeypatch, name, module, **{function: called}) == "loss"


def test_flsce_is_averaged_over_its_tokens(monkeypatch: pytest.MonkeyPatch):
    losses = types.SimpleNamespace(mean=lambda: "loss")
    function = types.SimpleNamespace(
        apply=lambda *arrays: losses if "".join(arrays) == "ECy" else 0
    )
    module = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    found = asked(
        monkeypatch, "liger-flsce", module, LigerFusedScaledCrossEntropySM90Function=function
    )
    assert found == "loss"


def test_quack_runs_its_fused_kernels_or_none(monkeypatch: pytest.MonkeyPatch):
    def loss(*arrays: str, **given: Any) -> str:
        assert (arrays, given) == (("E", "C", "y"), {"chunk_size": quack.CHUNK})
        return "loss"

    able = True

    def supported(hidden: str, head: str, chunk: int, reduction: str) -> bool:
        assert (hidden, head, chunk, reduction) == ("E", "C", quack.CHUNK, "mean")
        return able

    functions = {"scaled_exp_lce_supported": supported, "chunked_linear_cross_entropy": loss}
    module = "quack.linear_cross_entropy"
    assert asked(monkeypatch, "quack", module, **functions) == "loss"
    able = False
    with pytest.raises(ValueError, match="take bfloat16 on Hopper, V % 128 = 0"):
        asked(monkeypatch, "quack", module, **functions)


def test_what_has_no_options_refuses_them():
    for name in ("liger-flce", "liger-flsce", "quack"):
        refuses = IMPLEMENTATIONS[name].refuses
        assert refuses(SETTINGS) == "has no smoothing and no softcap"
        assert refuses(Settings(gradient_filter=None)) is None
    for name in ("liger", "liger-chunks", "liger-cute", "fla", "fla-bfloat16"):
        refuses = IMPLEMENTATIONS[name].refuses
        assert refuses(SETTINGS) is None
        assert refuses(Settings(stats=True, vocab_order=True)) == (
            "has no vocabulary order and no statistics"
        )


@pytest.mark.parametrize("name", ["fused", "hidden", "fp8"])
def test_another_filter_knows_none_of_ours(name: str):
    refuses = IMPLEMENTATIONS["cut-cross-entropy"].refuses
    assert refuses(Settings(gradient_filter=name)) == f"has no gradient filter {name!r}"
    for its_own in ("auto", None, 1e-4):
        assert refuses(Settings(gradient_filter=its_own)) is None


def test_every_peer_has_a_line_of_its_own_and_says_what_to_install():
    lines = {line.implementation: line.title for line in table.LINES}
    assert len(set(lines.values())) == len(lines)
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.backend is None:
            assert name in lines
            assert implementation.packages or name.startswith("torch")
