"""The interval of a proportion."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from lsce.calibration import validate


def wilson_interval(
    successes: Real[ArrayLike, "*any"], trials: Real[ArrayLike, "*any"], level: float = 0.95
) -> tuple[Float[np.ndarray, "*any"], Float[np.ndarray, "*any"]]:
    """Ends of the Wilson score interval of a probability, from `successes` out of `trials`.

    With p = successes/n and z the normal quantile of (1 + level)/2, the ends are
    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n). Never outside [0, 1], and of positive width
    for p = 0 and p = 1 too; (0, 1) where n = 0. ValueError unless 0 ≤ successes ≤ trials < ∞.

    Source: Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.

    >>> low, high = wilson_interval(8, 10)
    >>> f"{low:.4f} {high:.4f}"
    '0.4902 0.9433'
    """
    level = validate.unit_interval("level", level, open_ends=True)
    z = NormalDist().inv_cdf((1 + level) / 2)
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    k, n = np.broadcast_arrays(k, n)
    validate.refuse("trials", n, ~((n >= 0) & (n < np.inf)), "be finite and at least 0")
    possible = (k >= 0) & (k <= n * (1 + validate.ROUNDING))
    validate.refuse("successes", k, ~possible, "lie between 0 and trials")
    n = np.where(n > 0, n, 1)
    p = np.minimum(k / n, 1)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    seen = np.asarray(trials) > 0
    low = np.where(seen, np.clip(centre - half, 0, p), 0)
    return low[()], np.where(seen, np.clip(centre + half, p, 1), 1)[()]
