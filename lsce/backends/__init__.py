"""The implementations of the loss: one file or folder and one name each.

To add one, write a module with a `BACKEND` object of the protocol below and name it in `MODULES`;
the shared tests take it up under that name (tests/contract.py).
"""

import dataclasses
import importlib
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from lsce.problem import Problem
from lsce.stats import TokenStats
from lsce.wanted import Wanted

Outputs = tuple[Float[Array, " N"], TokenStats | None]

# In the order in which "auto" asks them.
MODULES = {
    "hopper": "lsce.backends.hopper",
    "chunked": "lsce.backends.chunked",
    "reference": "lsce.backends.reference",
}


class Arrays(NamedTuple):
    """The arrays of a call: N tokens of hidden size D, V classes; also one thing for each of them,
    such as its gradient or how it lies on the devices."""

    hidden: Any = None
    """E, [N, D]."""
    head: Any = None
    """C, [V, D], or [D, V] where the problem says so."""
    labels: Any = None
    """y, int32 [N]; −1 for a token without a loss."""
    bias: Any = None
    """b, [V], or None."""
    vocab_order: Any = None
    """A permutation of the classes, int32 [V], or None: a hint that may change the speed, and
    which of the probabilities below the filter are dropped; nothing else."""


@runtime_checkable
class Remarking(Protocol):
    """A backend that takes some calls at a price that its user should know of."""

    def remark(self, problem: Problem) -> str | None:
        """The price, such as a copy and its size; None for what costs nothing extra."""
        ...


@runtime_checkable
class Backend(Protocol):
    """One way to compute the loss of each token, float32.

    The loss and the statistics of a token without a loss (label −1) are 0, and so are its
    gradients, even where its hidden row is NaN.
    """

    name: str

    def refuses(self, problem: Problem) -> str | None:
        """Why this backend cannot take the problem; None when it can."""
        ...


@runtime_checkable
class Plain(Backend, Protocol):
    """A backend that JAX differentiates itself.

    The cotangent of a token without a loss is multiplied by 0 and not dropped: where its label is
    invalid it is NaN, and that has to reach the gradients.
    """

    def token_losses(
        self, problem: Problem, arrays: Arrays
    ) -> tuple[Float[Array, " N"], TokenStats | None]: ...


@runtime_checkable
class Differentiated(Backend, Protocol):
    """A backend whose derivative `lsce.loss` puts together from two passes."""

    twice_differentiable: bool
    """Whether JAX can differentiate both passes once more."""

    def call(self, problem: Problem) -> Any:
        """All that shapes the program of a call: hashable, with the problem as `.problem`."""
        ...

    def forward(self, call: Any, arrays: Arrays, *, keep: bool) -> tuple[Outputs, Any]:
        """Loss and statistics of each token, and, to `keep`, what the backward pass needs."""
        ...

    def backward(
        self, call: Any, kept: Any, wanted: Wanted, g: Float[Array, " N"], mark: Float[Array, ""]
    ) -> Arrays:
        """The gradients of Σ_n g_n·L_n + mark·(head and bias), None for what is not wanted.

        g counts at tokens with a loss only; the mark is 0, or NaN so that these gradients are.
        """
        ...


@runtime_checkable
class Fused(Differentiated, Protocol):
    """A backend that can also make the gradients of a sum in its forward pass, as "fused" asks and
    "fp8" allows."""

    def unfused(self, problem: Problem) -> str | None:
        """Why this problem's gradients are made afterwards all the same; None if they are not."""
        ...

    def fused(
        self,
        call: Any,
        arrays: Arrays,
        weights: Float[Array, " N"],
        wanted: Wanted,
        mark: Float[Array, ""],
    ) -> tuple[Float[Array, " N"], Arrays]:
        """The losses, and the gradients of Σ_n w_n·L_n + mark·head as `backward`'s."""
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
                able = isinstance(backend, Fused)
                why = backend.unfused(problem) if able else f"{chosen} has no other way"
                reasons[name] += f"; gradients are made afterwards: {why}" if why else ""
            remark = backend.remark(problem) if isinstance(backend, Remarking) else None
            reasons[name] += f"; {remark}" if remark else ""
        else:
            reason = refusal(name, problem)
            reasons[name] = f"refuses: {reason}" if reason else "able, not needed"
    return Explanation(chosen, reasons)


def _load(name: str) -> Backend:
    module = importlib.import_module(MODULES[name])
    if not hasattr(module, "BACKEND"):
        raise ImportError(f"{module.__name__} has no BACKEND")
    return module.BACKEND
