"""How far a model's confidence can be trusted: calibration metrics in JAX, jitted and mergeable.

Four ways in, by what is at hand:

* confidences and correctness of predictions (`lsce.TokenStats` has both):
  `expected_calibration_error` and its relatives in `binned`, `smooth_calibration_error`,
  `debiased_l2`, `top_label_brier_score`; whether it tells right from wrong at all: `auroc`,
  `risk_coverage` and its area `aurc`;
* probabilities of all classes, with labels: `brier_score` and its decomposition,
  `negative_log_likelihood`, and the errors over classes in `multiclass`;
* logits with labels: `fit_temperature`;
* batches that never meet in memory: `CalibrationState`.

`bootstrap_interval` puts error bars on any of them; `reliability_diagram` draws the picture. All
metrics are pure functions that can be called inside `jit`, `vmap` and `scan`. Called outside, they
refuse NaN, values out of range and shapes that do not fit; inside, such values make the result NaN.
"""

from lsce.calibration.binned import (
    confidence_gap,
    expected_calibration_error,
    hendrycks_rms,
    maximum_calibration_error,
    rms_calibration_error,
)
from lsce.calibration.bootstrap import Interval, bootstrap_interval
from lsce.calibration.debiased import debiased_l2, debiased_l2_interval
from lsce.calibration.diagram import reliability_diagram
from lsce.calibration.intervals import wilson_interval
from lsce.calibration.multiclass import (
    adaptive_calibration_error,
    classwise_ece,
    static_calibration_error,
    thresholded_adaptive_calibration_error,
)
from lsce.calibration.scores import (
    BrierDecomposition,
    brier_decomposition,
    brier_score,
    negative_log_likelihood,
    top_label_brier_score,
)
from lsce.calibration.selective import RiskCoverage, aurc, auroc, risk_coverage
from lsce.calibration.smooth import smooth_calibration_error
from lsce.calibration.state import CalibrationResult, CalibrationState
from lsce.calibration.temperature import fit_temperature

__all__ = [
    "BrierDecomposition",
    "CalibrationResult",
    "CalibrationState",
    "Interval",
    "RiskCoverage",
    "adaptive_calibration_error",
    "aurc",
    "auroc",
    "bootstrap_interval",
    "brier_decomposition",
    "brier_score",
    "classwise_ece",
    "confidence_gap",
    "debiased_l2",
    "debiased_l2_interval",
    "expected_calibration_error",
    "fit_temperature",
    "hendrycks_rms",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_diagram",
    "risk_coverage",
    "rms_calibration_error",
    "smooth_calibration_error",
    "static_calibration_error",
    "thresholded_adaptive_calibration_error",
    "top_label_brier_score",
    "wilson_interval",
]
