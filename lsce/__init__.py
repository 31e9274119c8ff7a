"""Label-smoothed cross-entropy for large vocabularies, with what calibration needs."""

import importlib
from typing import Any

from lsce.api import check_labels, explain, linear_cross_entropy
from lsce.order import vocabulary_order
from lsce.stats import TokenStats

__all__ = [
    "TokenStats",
    "calibration",
    "check_labels",
    "explain",
    "linear_cross_entropy",
    "vocabulary_order",
]


def __getattr__(name: str) -> Any:
    if name == "calibration":
        return importlib.import_module("lsce.calibration")
    raise AttributeError(f"module 'lsce' has no attribute {name!r}")
