"""What the families' config.json have in common, read with a check of every value."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from train.models.config import Rope

REQUIRED = object()
MOST_LAYERS = 10_000
"""No model has so many. A damaged file may say millions, and each is looked for."""


class Fields:
    """The fields of a config.json. Each is asked for with its type; ValueError if it has another.

    A field that is null counts as absent where the default is not None.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        return self._get(name, default, int, "a whole number above 0", lambda value: value > 0)

    def count(self, name: str, default: Any = REQUIRED) -> Any:
        return self._get(name, default, int, "a whole number from 0 on", lambda value: value >= 0)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._get(name, default, (int, float), "a finite number above 0", _finite)
        return value if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        return self._get(name, default, bool, "true or false")

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        return self._get(name, default, str, "a text")

    def part(self, name: str) -> Fields | None:
        """The fields of an object within."""
        value = self._get(name, None, Mapping, "an object")
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def refuse(self, name: str, *accepted: Any) -> None:
        """Raises ValueError unless the field is absent, null, or one of `accepted`."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            only = " or ".join(map(repr, accepted)) or "absent"
            raise ValueError(
                f"{self.where}: {name} is {value!r}; this decoder can only have it {only}"
            )

    def _get(self, name: str, default: Any, kind: Any, words: str, good: Any = None) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self.where} has no {name}")
            return default
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right or (good is not None and not good(value)):
            raise ValueError(f"{self.where}: {name} must be {words}, not {value!r}")
        return value


def _finite(value: float) -> bool:
    """Above 0, too. A whole number may be finite and too large for a float."""
    return 0 < value <= sys.float_info.max


def layers(fields: Fields) -> int:
    found = fields.integer("num_hidden_layers")
    if found > MOST_LAYERS:
        raise ValueError(f"{fields.where}: num_hidden_layers is {found:,}, more than any model's")
    return found


def common(fields: Fields) -> dict[str, Any]:
    """What is read alike in every family, as arguments of `ModelConfig`."""
    fields.refuse("quantization_config")
    fields.refuse("attention_bias", False)
    fields.refuse("mlp_bias", False)
    fields.refuse("partial_rotary_factor", 1, 1.0)
    heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    return {
        "model_type": fields.text("model_type"),
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "layers": layers(fields),
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", heads),
        "head_size": fields.integer("head_dim", hidden_size // heads),
        "mlp_size": fields.integer("intermediate_size"),
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
    }


def silu(fields: Fields) -> dict[str, Any]:
    """The activation of all but Gemma."""
    fields.refuse("hidden_act", "silu")
    return {"activation": "silu"}


def rope(fields: Fields, theta: float = 1e4) -> Rope:
    """The rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` of before 2026.

    Args:
        fields: of config.json.
        theta: the family's base where the file says nothing.
    """
    new = fields.part("rope_parameters")
    scaling = new or fields.part("rope_scaling")
    return rope_of(
        scaling, (new or fields).number("rope_theta", fields.number("rope_theta", theta))
    )


def rope_of(scaling: Fields | None, theta: float) -> Rope:
    """A base and a scaling, in the words of config.json."""
    if scaling is None:
        return Rope(theta)
    scaling.refuse("partial_rotary_factor", 1, 1.0)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", scaling.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            factor=scaling.number("factor"),
            low_frequency_factor=scaling.number("low_freq_factor"),
            high_frequency_factor=scaling.number("high_freq_factor"),
            original_length=scaling.integer("original_max_position_embeddings"),
        )
    raise ValueError(
        f"{scaling.where}: rope_type must be default, linear or llama3 for this decoder,"
        f" not {kind!r}"
    )


def sliding(fields: Fields, otherwise: Sequence[bool]) -> tuple[bool, ...]:
    """Which layers have a window: `layer_types`, or what the family does `otherwise`."""
    types = fields.values.get("layer_types")
    if types is None:
        return tuple(otherwise)
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or any(kind not in known for kind in types):
        raise ValueError(f"{fields.where}: layer_types must list {' and '.join(known)}: {types!r}")
    if len(types) != len(otherwise):
        raise ValueError(
            f"{fields.where}: layer_types has {len(types)} entries for {len(otherwise)} layers"
        )
    return tuple(kind == "sliding_attention" for kind in types)
