"""One way to compute the loss, and what it says to settings that it does not know."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from benchmarks.implementations.settings import Settings

FrameworkName = Literal["jax", "torch"]


def _unfiltered(settings: Settings, backend: str) -> Settings:
    """What a peer without a filter makes use of: its gradients are exact in any case, and no logit
    is of 8-bit operands though it may be."""
    return dataclasses.replace(settings, gradient_filter="auto", precision=None)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute the mean loss, in the arrays of one framework.

    `loss(hidden, head, labels, order, settings)` returns the scalar, or a pair with statistics
    where the settings ask for them. It imports its library when called, so that an absent one
    shows as an ImportError of that run alone.
    """

    name: str
    framework: FrameworkName
    loss: Callable[..., Any]
    refuses: Callable[[Settings], str | None]
    """Why the implementation cannot do what the settings ask for; None when it can."""
    packages: tuple[str, ...] = ()
    """The distributions on PyPI that it comes from: what to install, and the row's versions."""
    backend: Callable[..., str] | None = None
    """Called like `loss`: which of several kernels would run. None when there is only one."""
    heeded: Callable[[Settings, str], Settings] = _unfiltered
    """The settings without those that change nothing of what the backend of that name runs."""


def unsupported(settings: Settings, supported: tuple[str, ...]) -> str | None:
    """A refusal that names the options in use that are not among the `supported` ones.

    "exact" stands for a gradient filter of None, "filter" for any.
    """
    asked = {
        "smoothing": settings.label_smoothing != 0,
        "softcap": settings.softcap is not None,
        "filter": settings.gradient_filter not in ("auto", None),
        "exact": settings.gradient_filter is None and "filter" not in supported,
        "vocabulary order": settings.vocab_order,
        "statistics": settings.stats,
    }
    missing = [name for name, used in asked.items() if used and name not in supported]
    return f"has no {' and no '.join(missing)}" if missing else None
