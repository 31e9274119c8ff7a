"""Label-smoothed cross-entropy for large vocabularies, with what calibration needs."""

from lsce import calibration, theory
from lsce.api import check_labels, explain, linear_cross_entropy
from lsce.order import vocabulary_order
from lsce.stats import TokenStats

__all__ = [
    "TokenStats",
    "calibration",
    "check_labels",
    "explain",
    "linear_cross_entropy",
    "theory",
    "vocabulary_order",
]
