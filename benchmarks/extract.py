"""A real model's activations for the benchmarks: python -m benchmarks.extract GGUF JSONL FOLDER.

Runs a causal language model over texts and writes, in the pieces that `benchmarks.inputs.real.read`
takes, its last hidden states after the final norm, the tokens that followed, and its tied head.

The texts are instruction records, one JSON object with `instruction`, `input` and `output` a line,
packed into sequences of whole records of which the last is cut. Their format is --format:
"alpaca" between <bos> and <eos>, for a base model like Gemma, or "chatml", for SmolLM2 Instruct.

Needs `pip install torch transformers accelerate gguf`, none of which lsce depends on, and the head
as Q8_0. Mind the model's licence: Gemma's weights must not be passed on.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import tyro

from benchmarks import flags
from benchmarks.flags import shown

Record = dict[str, Any]
LENGTH = 512
PIECE = 45_000_000
"""Most bytes of a file of the head."""


def alpaca(record: Record) -> str:
    given = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
    asked = f"### Instruction:\n{record['instruction']}\n\n"
    return f"<bos>{asked}{given}### Response:\n{record['output']}<eos>"


def chatml(record: Record) -> str:
    given = f"\n\n{record['input']}" if record.get("input") else ""
    return (
        f"<|im_start|>user\n{record['instruction']}{given}<|im_end|>\n"
        f"<|im_start|>assistant\n{record['output']}<|im_end|>\n"
    )


Format = Literal["alpaca", "chatml"]
FORMATS: dict[Format, Callable[[Record], str]] = {"alpaca": alpaca, "chatml": chatml}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractFlags:
    model: tyro.conf.Positional[Annotated[pathlib.Path, shown("GGUF", "")]]
    """The model's file."""
    texts: tyro.conf.Positional[Annotated[pathlib.Path, shown("JSONL", "")]]
    """Instruction records."""
    folder: tyro.conf.Positional[Annotated[pathlib.Path, shown("FOLDER", "")]]
    """Where the pieces go."""
    format: Format = "alpaca"
    """How a record becomes a text."""
    tokens: Annotated[int, shown("TOKENS")] = 8192
    """At least as many."""
    classes: Annotated[int | None, shown("CLASSES", "all")] = None
    """Count only tokens whose label is below this."""

    def check(self) -> None:
        flags.check_at_least(1, "--tokens", self.tokens)
        flags.check_at_least(1, "--classes", self.classes)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return flags.run("extract", parse, extract, arguments)
    except ImportError as error:
        needs = "pip install torch transformers accelerate gguf"
        print(f"benchmarks.extract: {error}; {needs}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None = None) -> ExtractFlags:
    return flags.parse(ExtractFlags, "extract", __doc__, arguments)


def extract(options: ExtractFlags) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options.folder.mkdir(parents=True, exist_ok=True)
    quants, scales = head(options.model)
    load = {"gguf_file": options.model.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(options.model.parent, **load)
    model = AutoModelForCausalLM.from_pretrained(options.model.parent, dtype=torch.float32, **load)
    texts = map(FORMATS[options.format], records(options.texts))
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    # No training asks what follows the end of a text: here the beginning of another.
    begin = tokenizer.bos_token_id if options.format == "alpaca" else None
    hidden, labels, count = [], [], 0
    for sequence in packed(ids):
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0, :-1]
        following = np.array(sequence[1:], np.int32)
        kept = following != begin if begin is not None else np.ones(len(following), bool)
        hidden.append(states.numpy()[kept])
        labels.append(following[kept])
        count += int((labels[-1] < (options.classes or len(quants))).sum())
        print(f"\r{count} of {options.tokens} tokens", end="", file=sys.stderr)
        if count >= options.tokens:
            break
    else:
        raise ValueError(f"{options.texts} makes only {count} tokens, not {options.tokens}")
    print(file=sys.stderr)
    hidden, labels = np.concatenate(hidden), np.concatenate(labels)
    write(options.folder, hidden, labels, quants, scales)
    mean = nats(hidden[:1024], labels[:1024], quants, scales)
    print(f"{len(labels)} tokens in {options.folder}; the first 1,024 at {mean:.3f} nats")
    return 0


def records(path: pathlib.Path) -> Iterator[Record]:
    """The records with an answer. ValueError names the line that is none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                answered = bool(record["instruction"] and record["output"].strip())
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                reason = f"no instruction and output: {error!r}"
                raise ValueError(f"{path}, line {number}: {reason}") from None
            if answered:
                yield record


def packed(texts: Iterable[list[int]], length: int = LENGTH) -> Iterator[list[int]]:
    """Sequences of `length` tokens; each begins with a text and may cut off its last."""
    row: list[int] = []
    for ids in texts:
        row += ids
        if len(row) >= length:
            yield row[:length]
            row = []


def head(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Quants int8 [V, D] and scales float16 [V, D/32] of the tied embedding."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensor = tensors.get("token_embd.weight")
    if "output.weight" in tensors or tensor is None:
        raise ValueError(f"{path} has no head that is tied to its embedding")
    if tensor.tensor_type != gguf.GGMLQuantizationType.Q8_0:
        raise ValueError(f"{path}'s embedding is {tensor.tensor_type.name}; must be Q8_0")
    return unpacked(tensor.data)


def unpacked(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q8_0's blocks, a float16 scale before 32 quants, from bytes [V, 34 · D/32]."""
    blocks = data.reshape(len(data), -1, 34)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
    quants = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(len(data), -1)
    return quants, np.ascontiguousarray(scales)


def write(
    folder: pathlib.Path,
    hidden: np.ndarray,
    labels: np.ndarray,
    quants: np.ndarray,
    scales: np.ndarray,
    piece: int = PIECE,
) -> None:
    """The files that `benchmarks.inputs.real.read` describes."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "hidden.npy", hidden.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.save(folder / "labels.npy", labels.astype(np.int32))
    np.save(folder / "head_scales.npy", scales)
    rows = max(piece // quants.shape[1], 1)
    for i, start in enumerate(range(0, len(quants), rows)):
        np.save(folder / f"head_q{i}.npy", quants[start : start + rows])


def nats(hidden: np.ndarray, labels: np.ndarray, quants: np.ndarray, scales: np.ndarray) -> float:
    """The mean loss, by blocks of classes: a sign of life, 2 to 3 for these models."""
    total = np.full(len(hidden), -np.inf, np.float32)
    target = np.zeros(len(hidden), np.float32)
    for start in range(0, len(quants), 16384):
        part = quants[start : start + 16384]
        scale = scales[start : start + 16384, :, None].astype(np.float32)
        blocks = part.reshape(len(part), -1, 32) * scale
        z = hidden @ blocks.reshape(part.shape).T
        total = np.logaddexp(total, np.logaddexp.reduce(z, axis=1))
        mine = (labels >= start) & (labels < start + len(part))
        target[mine] = z[mine, labels[mine] - start]
    return float(np.mean(total - target))


if __name__ == "__main__":
    sys.exit(main())
