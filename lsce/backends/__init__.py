"""The implementations of the loss: one file or folder and one name each.

To add one, write a module with a `BACKEND` object of the protocol below and name it in `MODULES`;
the shared tests take it up under that name (tests/contract.py).
"""

import dataclasses
import importlib
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from lsce.problem import Problem
from lsce.stats import TokenStats

# In the order in which "auto" asks them.
MODULES = {
    "hopper": "lsce.backends.hopper",
    "chunked": "lsce.backends.chunked",
    "reference": "lsce.backends.reference",
}


@runtime_checkable
class Backend(Protocol):
    """One way to compute the loss of each token, float32, differentiable in hidden, head and bias.

    labels[n] = −1 says that token n has no loss: its loss and statistics are 0, and so are its
    gradients even where its hidden row is NaN. The cotangent of such a token is multiplied by 0
    and not dropped: the API marks a call with an invalid label by a NaN cotangent, which must
    reach the gradients. `vocab_order` may change the speed, and which of the probabilities below
    the filter are dropped; nothing else.
    """

    name: str

    def refuses(self, problem: Problem) -> str | None:
        """Why this backend cannot take the problem; None when it can."""
        ...

    def token_losses(
        self,
        problem: Problem,
        hidden: Float[Array, "N D"],
        head: Float[Array, "V D"] | Float[Array, "D V"],
        labels: Int[Array, " N"],
        bias: Float[Array, " V"] | None,
        vocab_order: Int[Array, " V"] | None,
    ) -> tuple[Float[Array, " N"], TokenStats | None]: ...


@runtime_checkable
class FusedBackend(Backend, Protocol):
    """A backend that can also make the gradients in its forward pass (gradient_filter="fused")."""

    def weighted_sum(
        self,
        problem: Problem,
        hidden: Float[Array, "N D"],
        head: Float[Array, "V D"] | Float[Array, "D V"],
        labels: Int[Array, " N"],
        weights: Float[Array, " N"],
        bias: Float[Array, " V"] | None,
        vocab_order: Int[Array, " V"] | None,
    ) -> tuple[Float[Array, ""], TokenStats | None]:
        """Σ_n w_n·L_n, differentiable in the weights too."""
        ...

    def unfused(self, problem: Problem) -> str | None:
        """Why `weighted_sum` makes this problem's gradients afterwards; None if it does not."""
        ...


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend takes a call, and what each one says of it; printable."""

    implementation: str
    reasons: dict[str, str]

    def adding(self, remark: str) -> "Explanation":
        """The same with a remark about the backend that takes the call."""
        chosen = f"{self.reasons[self.implementation]}; {remark}"
        return Explanation(self.implementation, self.reasons | {self.implementation: chosen})

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        return "\n".join(
            f"{'→' if name == self.implementation else ' '} {name:{width}}  {reason}"
            for name, reason in self.reasons.items()
        )


def refusal(name: str, problem: Problem) -> str | None:
    """Why the backend of that name cannot take the problem; None when it can."""
    try:
        backend = _load(name)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return backend.refuses(problem)


def choose(problem: Problem, implementation: Any = "auto") -> Backend:
    """The backend for a problem: the first able one for "auto", else the named one.

    Raises ValueError for an unknown name, or when the named backend refuses the problem.
    """
    if implementation == "auto":
        return _load(next(name for name in MODULES if refusal(name, problem) is None))
    if not isinstance(implementation, str) or implementation not in MODULES:
        names = ", ".join(repr(name) for name in ("auto", *MODULES))
        raise ValueError(f"implementation={implementation!r}; must be one of {names}")
    if reason := refusal(implementation, problem):
        raise ValueError(f"implementation={implementation!r} cannot take this call: {reason}")
    return _load(implementation)


def explain(problem: Problem, implementation: Any = "auto") -> Explanation:
    """The choice of `choose` with the reason of every backend."""
    backend = choose(problem, implementation)
    chosen, reasons = backend.name, {}
    for name in MODULES:
        if name == chosen:
            reasons[name] = "chosen: " + ("by name" if implementation == name else "the first able")
            if problem.gradient_filter == "fused":
                able = isinstance(backend, FusedBackend)
                why = backend.unfused(problem) if able else f"{chosen} has no other way"
                reasons[name] += f"; gradients are made afterwards: {why}" if why else ""
        else:
            reason = refusal(name, problem)
            reasons[name] = f"refuses: {reason}" if reason else "able, not needed"
    return Explanation(chosen, reasons)


def _load(name: str) -> Backend:
    module = importlib.import_module(MODULES[name])
    if not hasattr(module, "BACKEND"):
        raise ImportError(f"{module.__name__} has no BACKEND")
    return module.BACKEND
