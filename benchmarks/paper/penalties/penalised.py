"""Cross-entropy and β times a penalty of each token's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from lsce.backends import Arrays, reference
from lsce.problem import Problem
from lsce.stats import TokenStats


@dataclasses.dataclass(frozen=True)
class Penalised:
    """A backend of `lsce`'s whose losses are L = lse − z_y + β·penalty(z) + λ·lse², float32."""

    name: str
    penalty: Callable[[Float[Array, "N V"]], Float[Array, " N"]]

    def refuses(self, problem: Problem) -> str | None:
        return None

    def token_losses(
        self, problem: Problem, arrays: Arrays
    ) -> tuple[Float[Array, " N"], TokenStats | None]:
        plain = dataclasses.replace(problem, label_smoothing=0.0)
        loss, stats = reference.BACKEND.token_losses(plain, arrays)
        more = self.penalty(reference.logits(problem, arrays))  # the same logits, once compiled
        loss = loss + jnp.where(arrays.labels >= 0, problem.label_smoothing * more, 0.0)
        return loss, stats and stats._replace(loss=loss)
