"""The model of a run: from `--model`, or from the run's own folder, which needs nothing else.

A run keeps what its weights mean in `model/`: config.json, tokenizer.json, tokenizer_config.json
and generation_config.json, as a Hugging Face folder has them. The weights are in its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from train import files
from train.config import TrainConfig
from train.data.options import DataOptions
from train.flags import require
from train.models import families, lora, resolve
from train.models.config import SHAPES, ModelConfig
from train.models.decoder import Decoder
from train.models.resolve import Pretrained
from train.models.weights.load import abstract
from train.run.checkpoint import choose as choose_step
from train.run.checkpoint import first_line, said_once
from train.run.folder import CHECKPOINTS, MODEL, RUN_FILE, load
from train.text import pretrained
from train.text.bpe import BPE
from train.text.pretrained import PretrainedTokenizer
from train.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a run trains, before its weights are anywhere."""

    shape: ModelConfig
    """With the flags that say how it computes. From scratch, the tokenizer decides `vocab_size`."""
    source: Pretrained | None = None
    """The files whose weights training begins with; None for random ones, and when resumed."""
    tokenizer: PretrainedTokenizer | None = None
    """None where the run trains its own."""
    config_json: dict[str, Any] | None = None
    """What config.json says; None where the shape alone says it."""

    def trained_on(self, tokenizer: Tokenizer) -> Chosen:
        """With the vocabulary of the data's tokenizer, where that was not known before."""
        if self.tokenizer is not None:
            return self
        shape = dataclasses.replace(self.shape, vocab_size=tokenizer.vocab_size)
        return dataclasses.replace(self, shape=shape)


NARROWER = "tensor_dtypes"
"""In a run's config.json: dtypes of tensors that have another than the config's, by name."""


def _with_dtypes(found: resolve.Pretrained) -> dict[str, Any]:
    """What export gives back, beside what the config says."""
    tensors = found.tensors
    mixed = {NARROWER: dict(tensors.narrower)} if tensors.narrower else {}
    return {**found.config_json, "dtype": tensors.dtype, **mixed}


def _computed_in(dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def choose(config: TrainConfig, out: Path | None) -> Chosen:
    """The model that the flags ask for, or in `out`, a run to go on with, the one that it has.

    Raises:
      ValueError: what `resolve.find` raises, for tensors that do not fit, and for a template or a
        size of the vocabulary that cannot be used. Nothing large is allocated then.
    """
    flags = config.model
    computes = {
        "dropout": flags.dropout,
        "dtype": _computed_in(flags.dtype),
        "remat": flags.remat,
        "weights": flags.weights,
        "lora": config.trained.lora,
    }
    if out is not None and (out / MODEL).is_dir() and flags.model not in SHAPES:
        config_json = pretrained.read_json(out / MODEL / resolve.CONFIG)
        shape = families.read(config_json, str(out / MODEL / resolve.CONFIG))
        tokenizer = PretrainedTokenizer.from_folder(out / MODEL).of_head(shape.vocab_size)
        chosen = Chosen(dataclasses.replace(shape, **computes), None, tokenizer, config_json)
        return _of_known_tokens(chosen) if config.loss.smooth_known_tokens else chosen
    require(
        not (Path(flags.model) / RUN_FILE).is_file(),
        f"--model {flags.model} is a run: python -m train.export {flags.model} FOLDER makes a model"
        " of it",
    )
    found = resolve.find(flags.model)
    if isinstance(found, ModelConfig):
        require(
            flags.template == "auto",
            f"--template {flags.template} is for models that others trained: {flags.model} learns"
            " chats in a form of its own",
        )
        require(
            not config.loss.smooth_known_tokens,
            f"--smooth-known-tokens is for models that others trained: each row of {flags.model}'s"
            " head is a token's",
        )
        return Chosen(dataclasses.replace(found, vocab_size=config.data.vocab_size, **computes))
    require(
        config.data.vocab_size == DataOptions().vocab_size,
        f"--vocab-size {config.data.vocab_size} is for models from scratch: {flags.model} has a"
        " tokenizer",
    )
    found.check()
    shape = dataclasses.replace(found.config, **computes)
    config_json = _with_dtypes(found)
    chosen = Chosen(shape, found, found.tokenizer(flags.template), config_json)
    return _of_known_tokens(chosen) if config.loss.smooth_known_tokens else chosen


def _of_known_tokens(model: Chosen) -> Chosen:
    assert model.tokenizer is not None
    known, rows = model.tokenizer.vocab_size, model.shape.vocab_size
    require(
        known < rows,
        f"--smooth-known-tokens would change nothing: each of the head's {rows} rows is a token's",
    )
    return dataclasses.replace(model, shape=dataclasses.replace(model.shape, known_tokens=known))


def write(out: Path, model: Chosen, tokenizer: Tokenizer) -> None:
    """Puts `model/` into the run's folder, each file whole or not at all."""
    folder = out / MODEL
    folder.mkdir(exist_ok=True)
    for name, content in description(model, tokenizer).items():
        files.write(folder / name, content)


def description(model: Chosen, tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a Hugging Face folder besides the weights, by name."""
    own = not isinstance(tokenizer, PretrainedTokenizer)
    special, generation = (OWN_SPECIAL, {}) if own else (tokenizer.config(), tokenizer.generation)
    config = model.config_json or families.write(model.shape)
    stops = sorted(tokenizer.stops)
    ids = {name: config[name] for name in config if name.endswith("_token_id")}
    if own:
        ids = {"bos_token_id": BPE.bos, "eos_token_id": BPE.end, "pad_token_id": BPE.pad}
        config |= ids
    return {
        resolve.CONFIG: _json(config),
        pretrained.TOKENIZER: tokenizer.to_json(),
        pretrained.CONFIG: _json(special),
        pretrained.GENERATION: _json({**ids, **generation, "eos_token_id": stops}),
    }


OWN_SPECIAL: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|bos|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "chat_template": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "clean_up_tokenization_spaces": False,
}
"""tokenizer_config.json of a run's own BPE."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its weights, from a run or from files."""

    shape: ModelConfig
    params: nnx.State
    tokenizer: PretrainedTokenizer
    config_json: dict[str, Any]
    step: int | None = None
    """The optimizer step of a run's weights; None for other models."""

    @property
    def architecture(self) -> str:
        """What transformers calls its class."""
        return families.page(self.shape.model_type).ARCHITECTURES[self.shape.model_type]

    @property
    def model(self) -> Decoder:
        return nnx.merge(nnx.graphdef(abstract(self.shape)), self.params)


def read(
    where: str,
    *,
    dtype: str = "float32",
    template: str = "auto",
    checkpoint: str = "last",
    merge: bool = True,
) -> Loaded:
    """A run's model at one of its checkpoints, or whatever `--model` can be.

    Args:
      checkpoint: of a run: best, last, or a step.
      merge: a run's adapters into the weights that they are on.

    Raises:
      ValueError: for a run without that checkpoint or of another version, for another folder, for
        what is trained from scratch and so has no weights, and what `resolve.find` raises.
    """
    out = Path(where)
    if not (out / RUN_FILE).is_file():
        require(
            not out.is_dir() or (out / resolve.CONFIG).is_file(),
            f"{out} is neither a run ({RUN_FILE} is missing) nor a model ({resolve.CONFIG} is"
            " missing)",
        )
        require(
            out.exists() or resolve.is_name(where),
            f"there is no run and no model {where}: name a run's folder, {resolve.CHOICES}",
        )
        require(checkpoint == "last", f"--checkpoint {checkpoint} is for runs: {where} is a model")
        found = resolve.find(where)
        if isinstance(found, ModelConfig):
            raise ValueError(f"{where} is trained from scratch: name the folder of a run of it")
        shape = dataclasses.replace(found.config, dtype=dtype)
        config_json = _with_dtypes(found)
        tokenizer = found.tokenizer(template)  # first, as it is refused at once
        return Loaded(shape, found.load(), tokenizer, config_json)
    run = load(out)
    if not (out / MODEL / resolve.CONFIG).is_file():
        raise ValueError(f"{out} has no {MODEL}/{resolve.CONFIG}: it is of another version")
    config_json = pretrained.read_json(out / MODEL / resolve.CONFIG)
    shape = families.read(config_json, str(out / MODEL / resolve.CONFIG))
    shape = dataclasses.replace(shape, lora=run.trained.lora)
    step = choose_step(out, checkpoint)
    params = _params(out / CHECKPOINTS / str(step) / "state", shape)
    why = f" ({checkpoint})" if checkpoint in ("best", "last") else ""
    logger.info("weights: step %d of %s%s", step, out, why)
    if merge and shape.lora is not None:
        shape, params = lora.merged(shape, params)
        config_json["tie_word_embeddings"] = shape.tied_head
    tokenizer = PretrainedTokenizer.from_folder(out / MODEL, template).of_head(shape.vocab_size)
    # The logits that the run learnt, whatever config.json can say of them.
    softcap = run.loss.softcap or shape.final_softcap
    shape = dataclasses.replace(shape, dtype=dtype, final_softcap=softcap)
    return Loaded(shape, params, tokenizer, config_json, step)


def _params(path: Path, shape: ModelConfig) -> nnx.State:
    """The weights in a checkpoint, without the optimizer's moments."""
    like = nnx.state(abstract(shape))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        "params": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like
        )
    }
    try:
        with said_once(), ocp.PyTreeCheckpointer() as reader:
            found = reader.restore(
                path.absolute(),
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # of any kind, whatever is damaged
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    return found["params"]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
