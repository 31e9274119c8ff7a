"""What to measure: one implementation of the loss, in one mode, with one set of options."""

import dataclasses
import math
from typing import Any, Literal, get_args

Mode = Literal["fwd", "fwdbwd"]
MODES: tuple[Mode, ...] = get_args(Mode)
PRODUCTS: dict[Mode, int] = {"fwd": 1, "fwdbwd": 3}
"""N×D×V matrix products that the mathematics asks for: the logits, and dE and dC. Recomputed
logits are not counted, and neither is work that a filter skips, so TFLOP/s compare implementations
by the time they take."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the loss; named as in `lsce.linear_cross_entropy`."""

    label_smoothing: float = 0.0
    softcap: float | None = None
    gradient_filter: float | str | None = "auto"
    vocab_order: bool = False
    """Whether a permutation of the vocabulary is handed over, made before the clock starts."""
    stats: bool = False
    precision: str | None = None
    """"fp8": the logits may be computed from 8-bit operands."""

    def __post_init__(self) -> None:
        # Here and not in the loss alone, because most peers would compute something.
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label smoothing must be in [0, 1], not {self.label_smoothing}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be finite and above 0, not {self.softcap}")
        epsilon = self.gradient_filter
        if not (epsilon is None or isinstance(epsilon, str) or 0 <= epsilon < 1):
            raise ValueError(f"gradient filter must be in [0, 1), not {epsilon}")


@dataclasses.dataclass(frozen=True)
class Run:
    """One row to measure."""

    implementation: str
    mode: Mode
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}; must be one of {', '.join(MODES)}")


def gradient_filter(text: str) -> float | str | None:
    """Reads a gradient filter from the command line: auto, none, fused, hidden, fp8 or a number."""
    if text in ("auto", "fused", "hidden", "fp8"):
        return text
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"gradient filter {text!r}; must be auto, none (exact), fused, hidden, fp8 or a number "
            "ε"
        ) from None


def run_from_json(fields: dict[str, Any]) -> Run:
    """The inverse of `dataclasses.asdict`."""
    return Run(**{**fields, "settings": Settings(**fields["settings"])})
