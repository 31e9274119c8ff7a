"""What a user would pick instead: transformers' model, torch.compile, SDPA, fused AdamW."""

import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.implementations.settings import Settings
from benchmarks.measure import timing
from benchmarks.steps.row import Measured, why
from benchmarks.steps.variant import SHAPES, Variant, batch_of, shape_of
from train.data.packing import IGNORE
from train.models.config import ModelConfig


def measure(
    model: str, variants: Sequence[Variant], length: int, *, seconds: float
) -> Iterator[tuple[Variant, Measured | str]]:
    """Each variant and what was found, or why nothing was."""
    for variant in variants:
        try:
            found = _run(model, variant, length, seconds)
        except Exception as error:
            found = why(error)
        yield variant, found
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def config_of(model: str, shape: ModelConfig) -> Any:
    """transformers' configuration of a shape."""
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.mlp_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_head,
        "use_cache": False,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    if model.startswith("gemma"):
        kind = {"gemma2": transformers.Gemma2Config, "gemma3_text": transformers.Gemma3TextConfig}
        layers = ["sliding_attention" if s else "full_attention" for s in shape.sliding]
        extra = {
            "sliding_window": shape.window,
            "layer_types": layers,
            "query_pre_attn_scalar": shape.head_size,
        }
        return kind[shape.model_type](**common, **extra)
    return transformers.LlamaConfig(**common)


def _run(name: str, variant: Variant, length: int, seconds: float) -> Measured:
    """Float32 weights under bfloat16 autocast; gradients clipped at norm 1, as ours.

    Rows are seen whole: SDPA with the mask of packed segments would leave its flash kernel.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape_of(name, variant)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    net = transformers.AutoModelForCausalLM.from_config(config_of(name, shape)).to(device).train()
    backbone = torch.compile(net.model) if variant.compiled else net.model
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.1, fused=device == "cuda")
    batch = batch_of(SHAPES[name], variant, length)
    tokens, labels = (torch.as_tensor(batch[key]).long().to(device) for key in ("tokens", "labels"))
    head = net.get_output_embeddings().weight
    settings = Settings(label_smoothing=variant.beta, softcap=shape.final_softcap)

    def full(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ head.to(hidden.dtype).T).float()
        if shape.final_softcap:
            logits = shape.final_softcap * torch.tanh(logits / shape.final_softcap)
        return torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORE, label_smoothing=variant.beta
        )

    whole = torch.compile(full) if variant.compiled else full

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, shape.hidden_size)
        if variant.loss in ("auto", "full"):
            return whole(flat, labels.reshape(-1))
        peer = IMPLEMENTATIONS[variant.loss]
        bare = flat.to(torch.bfloat16), head.to(torch.bfloat16)
        return peer.loss(*bare, labels.reshape(-1), None, settings)

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(backbone(input_ids=tokens).last_hidden_state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(result: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    first = float(step())
    compile_s = time.perf_counter() - start
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = timing.beside([step], wait, seconds=seconds)[0]
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    return Measured(
        p20_ms=times.p20_ms,
        p50_ms=times.p50_ms,
        p80_ms=times.p80_ms,
        first_loss=first,
        last_loss=float(step()),
        state_gb=3 * weights / 1e9,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
        compile_s=compile_s,
        attention="sdpa, rows seen whole",
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        framework=f"torch {torch.__version__}, transformers {transformers.__version__}",
    )
