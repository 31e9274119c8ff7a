"""How far a model's confidence can be trusted: calibration metrics in JAX, jitted and mergeable.

Three ways in, by what is at hand:

* confidences and correctness of predictions (`lsce.TokenStats` has both):
  `expected_calibration_error` and its relatives in `binned`;
* class probabilities with labels: `brier_score`, `negative_log_likelihood`;
* batches that never fit in memory together: `CalibrationState`.

`reliability_diagram` draws the picture.
"""

from lsce.calibration.binned import (
    confidence_gap,
    expected_calibration_error,
    hendrycks_rms,
    maximum_calibration_error,
    rms_calibration_error,
)
from lsce.calibration.diagram import reliability_diagram
from lsce.calibration.scores import brier_score, negative_log_likelihood, top_label_brier_score
from lsce.calibration.state import CalibrationResult, CalibrationState

__all__ = [
    "CalibrationResult",
    "CalibrationState",
    "brier_score",
    "confidence_gap",
    "expected_calibration_error",
    "hendrycks_rms",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_diagram",
    "rms_calibration_error",
    "top_label_brier_score",
]
