"""Sums over some of the classes, which add up to the sums over all: the online softmax.

Tiles of a loop, parts of the vocabulary that different processors take and, next, its shards on
different devices are one and the same thing: disjoint sets of classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce import formula
from lsce.problem import Problem
from lsce.stats import TokenStats

NO_CLASS = 2**31 - 1
NOT_SUMMED = {"maximum": None, "argmax": None}


class LogitSums(NamedTuple):
    """What the loss and the statistics need of the logits z_v of N tokens over some of the classes.

    The exponentials are taken relative to the maximum m (to 0 where that is infinite), so that they
    cannot overflow. A field that nobody made is None; one that ends up unused is dropped by the
    compiler. In `over` all have one more axis.
    """

    maximum: Float[Array, " N"]
    """m = max_v z_v; −∞ over no classes."""
    plain: Float[Array, " N"]
    """Σ_v z_v."""
    exp: Float[Array, " N"]
    """Σ_v exp(z_v − m)."""
    target: Float[Array, " N"] | None = None
    """z_y where y is among the classes, else 0."""
    argmax: Int[Array, " N"] | None = None
    """argmax_v z_v, the smallest index among equals."""
    shifted_exp: Float[Array, " N"] | None = None
    """Σ_v (z_v − m)·exp(z_v − m)."""
    exp_squared: Float[Array, " N"] | None = None
    """Σ_v exp(z_v − m)²."""
    kept: Float[Array, " N"] | None = None
    """Σ_v exp(z_v − m) over the classes above the gradient's filter."""
    squares: Float[Array, " N"] | None = None
    """Σ_v z_v²."""

    @classmethod
    def empty(cls, n: int) -> "LogitSums":
        """The sums of n tokens over no classes, as `of` makes them."""
        zeros = jnp.zeros(n, jnp.float32)
        return cls(
            maximum=zeros - jnp.inf,
            plain=zeros,
            exp=zeros,
            target=zeros,
            argmax=jnp.full(n, NO_CLASS, jnp.int32),
            shifted_exp=zeros,
            exp_squared=zeros,
        )

    @classmethod
    def of(cls, z: Float[Array, "N W"], labels: Int[Array, " N"], first: Any) -> "LogitSums":
        """The sums over the W classes from `first` on, whose logits are z."""
        maximum = jnp.max(z, axis=1)
        shifted = z - _finite(maximum)[:, None]
        exp = jnp.exp(shifted)
        column = labels - first
        here = (column >= 0) & (column < z.shape[1])
        target = jnp.take_along_axis(z, jnp.where(here, column, 0)[:, None], axis=1)[:, 0]
        return cls(
            maximum=maximum,
            plain=jnp.sum(z, axis=1),
            exp=jnp.sum(exp, axis=1),
            target=jnp.where(here, target, 0.0),
            argmax=first + jnp.argmax(z, axis=1).astype(jnp.int32),
            # A class masked by −∞ has no share, and 0 · −∞ is NaN.
            shifted_exp=jnp.sum(jnp.where(exp > 0.0, shifted, 0.0) * exp, axis=1),
            exp_squared=jnp.sum(jnp.square(exp), axis=1),
        )

    def combine(self, other: "LogitSums") -> "LogitSums":
        """The sums over the classes of both."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        a: Any = self.relative_to(maximum)
        b: Any = other.relative_to(maximum)
        argmax = None
        if a.argmax is not None and b.argmax is not None:
            argmax = jnp.minimum(a.argmax, b.argmax)
        summed = jax.tree.map(jnp.add, a._replace(**NOT_SUMMED), b._replace(**NOT_SUMMED))
        return summed._replace(maximum=maximum, argmax=argmax)

    def over(self, axis: int | str) -> "LogitSums":
        """The sums over the classes of all along an axis: of the arrays, or (by name) of a mesh."""
        most: Any = lax.pmax if isinstance(axis, str) else jnp.max
        least: Any = lax.pmin if isinstance(axis, str) else jnp.min
        total: Any = lax.psum if isinstance(axis, str) else jnp.sum
        maximum = most(self.maximum, axis)
        wide = maximum if isinstance(axis, str) else jnp.expand_dims(maximum, axis)
        parts: Any = self.relative_to(wide)
        argmax = None if parts.argmax is None else least(parts.argmax, axis)
        summed = jax.tree.map(lambda x: total(x, axis), parts._replace(**NOT_SUMMED))
        return summed._replace(maximum=maximum, argmax=argmax)

    def relative_to(self, maximum: Float[Array, "*parts N"]) -> "LogitSums":
        """The same sums relative to a maximum over more classes; no argmax where it is not ours."""
        shift = self.maximum - _finite(maximum)
        factor = jnp.exp(shift)
        shift = jnp.where(factor > 0.0, shift, 0.0)
        changed: dict[str, Any] = {"maximum": maximum, "exp": factor * self.exp}
        if self.argmax is not None:
            changed["argmax"] = jnp.where(self.maximum == maximum, self.argmax, NO_CLASS)
        if self.shifted_exp is not None:
            changed["shifted_exp"] = factor * (self.shifted_exp + shift * self.exp)
        if self.exp_squared is not None:
            changed["exp_squared"] = jnp.square(factor) * self.exp_squared
        if self.kept is not None:
            changed["kept"] = factor * self.kept
        return self._replace(**changed)

    @property
    def lse(self) -> Float[Array, " N"]:
        """log Σ_v exp z_v."""
        return _finite(self.maximum) + jnp.log(self.exp)

    # A kernel may round the largest of the exponentials, 1, to a little less, and the sum with it:
    # so what cannot be more than 1 or less than 0 is kept from that here.

    @property
    def confidence(self) -> Float[Array, " N"]:
        """max_v p_v."""
        return jnp.minimum(1.0 / self.exp, 1.0)

    @property
    def entropy(self) -> Float[Array, " N"]:
        """−Σ_v p_v log p_v, in nats."""
        assert self.shifted_exp is not None
        return jnp.maximum(jnp.log(self.exp) - self.shifted_exp / self.exp, 0.0)

    @property
    def sum_p_squared(self) -> Float[Array, " N"]:
        """Σ_v p_v²."""
        assert self.exp_squared is not None
        return jnp.minimum(self.exp_squared / jnp.square(self.exp), 1.0)

    def finish(
        self, problem: Problem, labels: Int[Array, " N"]
    ) -> tuple[Float[Array, " N"], TokenStats | None]:
        """The loss and (if asked for) statistics of the tokens, from the sums over all V.

        They are 0 where the label is negative.
        """
        assert self.target is not None
        live = labels >= 0
        mean_logit = self.plain / problem.v
        loss = formula.token_loss(problem, self.lse, self.target, mean_logit)
        loss = jnp.where(live, loss, 0.0)
        if not problem.return_stats:
            return loss, None
        assert self.argmax is not None
        stats = TokenStats(
            loss=loss,
            lse=self.lse,
            target_logit=self.target,
            mean_logit=mean_logit,
            confidence=self.confidence,
            prediction=self.argmax,
            correct=self.argmax == labels,
            entropy=self.entropy,
            sum_p_squared=self.sum_p_squared,
            below_filter=jnp.zeros_like(loss),
        )
        return loss, stats.only(live)


def _finite(maximum: Float[Array, "*parts N"]) -> Float[Array, "*parts N"]:
    """The shift for exponentials: the maximum, and 0 where that is infinite or NaN."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0.0)
