"""The definition of right: the equation on materialised N×V logits, differentiated by JAX itself.

Any order of differentiation, forward or reverse; memory of several N×V float32 arrays.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsce import formula
from lsce.backends import Arrays
from lsce.problem import Problem
from lsce.stats import TokenStats


def logits(problem: Problem, arrays: Arrays) -> Float[Array, "N V"]:
    """z of every token and class; of a token without a loss those of a hidden state of zeros."""
    hidden, head, labels, bias, _ = arrays
    live = labels >= 0
    # The row of a token without a label may hold anything, and 0 · NaN would reach the head.
    # Zeros made by 0 · x, here and below, still let a NaN cotangent mark the gradients.
    hidden = hidden.astype(jnp.float32)
    hidden = jnp.where(live[:, None], hidden, 0.0 * jnp.nan_to_num(hidden))
    head = head.astype(jnp.float32)
    columns = head.T if problem.head_layout == "vd" else head
    product = jnp.dot(hidden, columns, precision=jax.lax.Precision.HIGHEST)
    return formula.logits(problem, product, bias)


class Reference:
    name = "reference"

    def refuses(self, problem: Problem) -> str | None:
        return None

    def token_losses(
        self, problem: Problem, arrays: Arrays
    ) -> tuple[Float[Array, " N"], TokenStats | None]:
        z, labels = logits(problem, arrays), arrays.labels
        live = labels >= 0
        lse = jax.nn.logsumexp(z, axis=1)
        target = jnp.maximum(labels, 0)
        target_logit = jnp.take_along_axis(z, target[:, None], axis=1)[:, 0]
        mean_logit = jnp.mean(z, axis=1)
        loss = formula.token_loss(problem, lse, target_logit, mean_logit)
        loss = jnp.where(live, loss, 0.0 * lse)
        if not problem.return_stats:
            return loss, None

        p, log_p = jax.nn.softmax(z, axis=1), jax.nn.log_softmax(z, axis=1)
        prediction = jnp.argmax(z, axis=1).astype(jnp.int32)
        stats = TokenStats(
            loss=loss,
            lse=lse,
            target_logit=target_logit,
            mean_logit=mean_logit,
            confidence=jnp.max(p, axis=1),
            prediction=prediction,
            correct=prediction == labels,
            entropy=-jnp.sum(jnp.where(p > 0.0, p * log_p, 0.0), axis=1),
            sum_p_squared=jnp.sum(jnp.square(p), axis=1),
            below_filter=jnp.zeros_like(loss),
        )
        return loss, jax.lax.stop_gradient(stats.only(live))


BACKEND = Reference()
