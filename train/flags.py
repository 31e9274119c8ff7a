"""How a field of the configuration becomes a flag: its name, how it is shown, what refuses it."""

from __future__ import annotations

import math
from typing import Any

import tyro


def flag(name: str) -> str:
    """`--label-smoothing` for `label_smoothing`."""
    return "--" + name.replace("_", "-")


def shown(metavar: str, default: str | None = None) -> Any:
    """What --help shows as a flag's value, and as its default if that is not the field's own."""
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def require(condition: bool, message: str) -> None:
    """Raises ValueError with that message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_share(name: str, value: float) -> None:
    require(0 <= value < 1, f"{flag(name)} must be in [0, 1), not {value}")


def require_positive(name: str, value: float | None) -> None:
    require(
        value is None or 0 < value < math.inf,
        f"{flag(name)} must be finite and more than 0, not {value}",
    )


def require_not_negative(name: str, value: float) -> None:
    require(0 <= value < math.inf, f"{flag(name)} must be finite and at least 0, not {value}")


def require_count(name: str, value: int | None) -> None:
    require(value is None or value >= 1, f"{flag(name)} must be at least 1, not {value}")
