"""Makes the oracle files with transformers and torch, which nothing else here needs.

    pip install torch transformers accelerate gguf safetensors sentencepiece
    python tests/oracles/make.py [SMOLLM2.gguf GEMMA3.gguf]

Without the two files only the families' oracles are made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from inputs import FAMILIES, POSITIONS, REAL, SENTENCES, sequences, strings, weights
from tokenizers import pre_tokenizers

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama 3.1, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 12}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "gemma 2": (
        "Gemma2",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma 3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "qwen 2.5": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen 3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def families() -> None:
    kept = {}
    for name, (family, changes) in CASES.items():
        config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
        config.architectures = [f"{family.removesuffix('Text')}ForCausalLM"]
        model = getattr(transformers, config.architectures[0])._from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        seeded = weights(shapes, zero_centred=family.startswith("Gemma"))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(seeded[parameter_name]))
        tokens = sequences(config.vocab_size)
        length = max(map(len, tokens))
        padded = torch.tensor(np.stack([np.pad(t, (0, length - len(t))) for t in tokens]))
        mask = torch.tensor([[i < len(t) for i in range(length)] for t in tokens]).long()
        with torch.no_grad():
            out = model.eval()(padded, attention_mask=mask, output_hidden_states=True)
        kept[f"{name}/config"] = json.dumps(json.loads(config.to_json_string(use_diff=False)))
        kept[f"{name}/shapes"] = json.dumps(shapes)
        for i, positions in enumerate(POSITIONS):
            kept[f"{name}/hidden{i}"] = out.hidden_states[-1][i, positions].numpy()
            kept[f"{name}/logits{i}"] = out.logits[i, positions].numpy()
    np.savez_compressed(FAMILIES, **kept)


def real(files: dict[str, Path]) -> None:
    kept = {}
    for name, file in files.items():
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        if name == "smollm2-135m":  # whose "smollm" split transformers 5.24 does not know
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in strings()]
        kept[f"{name}/ids"] = np.concatenate(ids).astype(np.int32)
        kept[f"{name}/lengths"] = np.array(list(map(len, ids)), np.int32)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        losses = []
        for sentence in SENTENCES:
            tokens = torch.tensor([tokenizer(sentence)["input_ids"]])
            with torch.no_grad():
                losses.append(float(model.eval()(tokens, labels=tokens).loss))
        kept[f"{name}/nll"] = np.array(losses)
        print(name, np.mean(losses), tokenizer(SENTENCES[0])["input_ids"][:5])
    np.savez_compressed(REAL, **kept)


if __name__ == "__main__":
    families()
    if len(sys.argv) == 3:
        real(dict(zip(("smollm2-135m", "gemma3-270m"), map(Path, sys.argv[1:]), strict=True)))
