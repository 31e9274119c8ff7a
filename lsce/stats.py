"""Per-token statistics that come out of the same pass as the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsce import formula
from lsce.problem import Problem


class TokenStats(NamedTuple):
    """What the loss saw at each token, float32, without gradients; logarithms are natural (nats).

    With p = softmax(z) over the V logits z of a token with label y. Ignored tokens hold zeros
    (and `prediction` 0, `correct` False).
    """

    loss: Float[Array, "*tokens"]
    """The token's loss before weights and reduction."""
    lse: Float[Array, "*tokens"]
    """log Σ_v exp z_v."""
    target_logit: Float[Array, "*tokens"]
    """z_y."""
    mean_logit: Float[Array, "*tokens"]
    """(1/V) Σ_v z_v."""
    confidence: Float[Array, "*tokens"]
    """max_v p_v."""
    prediction: Int[Array, "*tokens"]
    """argmax_v z_v, the smallest index among equals; int32."""
    correct: Bool[Array, "*tokens"]
    """prediction == y."""
    entropy: Float[Array, "*tokens"]
    """−Σ_v p_v log p_v."""
    sum_p_squared: Float[Array, "*tokens"]
    """Σ_v p_v²."""
    below_filter: Float[Array, "*tokens"]
    """Σ_v p_v over the classes that the gradient's filter allows to leave out, the most that it
    does leave out: 0 without a filter, and where no gradient is taken."""

    def only(self, live: Bool[Array, "*tokens"]) -> "TokenStats":
        """These statistics with zeros where `live` is False."""
        return jax.tree.map(lambda x: jnp.where(live, x, jnp.zeros_like(x)), self)


class LogitSums(NamedTuple):
    """What the loss and the statistics need of the logits z_v of N tokens over some of the classes.

    The sums over two sets of classes combine into the sums over both. The exponentials are taken
    relative to the maximum m (to 0 where that is infinite), so that they cannot overflow. A field
    that ends up unused is dropped by the compiler.
    """

    maximum: Float[Array, " N"]
    """m = max_v z_v; −∞ over no classes."""
    argmax: Int[Array, " N"]
    """argmax_v z_v, the smallest index among equals."""
    target: Float[Array, " N"]
    """z_y where y is among the classes, else 0."""
    plain: Float[Array, " N"]
    """Σ_v z_v."""
    exp: Float[Array, " N"]
    """Σ_v exp(z_v − m)."""
    shifted_exp: Float[Array, " N"]
    """Σ_v (z_v − m)·exp(z_v − m)."""
    exp_squared: Float[Array, " N"]
    """Σ_v exp(z_v − m)²."""

    @classmethod
    def empty(cls, n: int) -> "LogitSums":
        """The sums of n tokens over no classes."""
        zeros = jnp.zeros(n, jnp.float32)
        return cls(zeros - jnp.inf, jnp.zeros(n, jnp.int32), *[zeros] * 5)

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
            argmax=first + jnp.argmax(z, axis=1).astype(jnp.int32),
            target=jnp.where(here, target, 0.0),
            plain=jnp.sum(z, axis=1),
            exp=jnp.sum(exp, axis=1),
            # A class masked by −∞ has no share, and 0 · −∞ is NaN.
            shifted_exp=jnp.sum(jnp.where(exp > 0.0, shifted, 0.0) * exp, axis=1),
            exp_squared=jnp.sum(jnp.square(exp), axis=1),
        )

    def combine(self, other: "LogitSums") -> "LogitSums":
        """The sums over the classes of both."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        a, b = self._relative_to(maximum), other._relative_to(maximum)
        first_of_equals = jnp.minimum(a.argmax, b.argmax)
        larger = jnp.where(self.maximum > other.maximum, a.argmax, b.argmax)
        tied = self.maximum == other.maximum
        return LogitSums(
            maximum=maximum,
            argmax=jnp.where(tied, first_of_equals, larger),
            target=a.target + b.target,
            plain=a.plain + b.plain,
            exp=a.exp + b.exp,
            shifted_exp=a.shifted_exp + b.shifted_exp,
            exp_squared=a.exp_squared + b.exp_squared,
        )

    def _relative_to(self, maximum: Float[Array, " N"]) -> "LogitSums":
        """The same sums with the exponentials relative to a larger maximum."""
        shift = self.maximum - _finite(maximum)
        factor = jnp.exp(shift)
        shift = jnp.where(factor > 0.0, shift, 0.0)
        return self._replace(
            exp=factor * self.exp,
            shifted_exp=factor * (self.shifted_exp + shift * self.exp),
            exp_squared=jnp.square(factor) * self.exp_squared,
        )

    def finish(
        self, problem: Problem, labels: Int[Array, " N"]
    ) -> tuple[Float[Array, " N"], Float[Array, " N"], TokenStats | None]:
        """The loss, lse and (if asked for) statistics of the tokens, from the sums over all V.

        Loss and statistics are 0 where the label is negative; the lse is what it is.
        """
        live = labels >= 0
        log_exp = jnp.log(self.exp)
        lse = _finite(self.maximum) + log_exp
        mean_logit = self.plain / problem.v
        loss = formula.token_loss(problem, lse, self.target, mean_logit)
        loss = jnp.where(live, loss, 0.0)
        if not problem.return_stats:
            return loss, lse, None
        stats = TokenStats(
            loss=loss,
            lse=lse,
            target_logit=self.target,
            mean_logit=mean_logit,
            confidence=1.0 / self.exp,
            prediction=self.argmax,
            correct=self.argmax == labels,
            entropy=log_exp - self.shifted_exp / self.exp,
            sum_p_squared=self.exp_squared / jnp.square(self.exp),
            below_filter=jnp.zeros_like(loss),
        )
        return loss, lse, stats.only(live)


def _finite(maximum: Float[Array, " N"]) -> Float[Array, " N"]:
    """The shift for exponentials: the maximum, and 0 where that is infinite or NaN."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0.0)
