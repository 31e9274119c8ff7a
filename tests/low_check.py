"""Losses with 8-bit operands where a logit is small, in plain numpy: what kernels are held to."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from contract import Case
from scipy.special import logsumexp

from lsce.sparse import tail


def emulated(this: Case, large: float) -> tuple[np.ndarray, float]:
    """w·L of each token, and the share of the columns that take 16 bits.

    Of a call with gradients, whose scales are those of tokens with a loss.
    """
    given, options, stats = this.inputs, this.options, this.truth.stats
    assert stats is not None
    scale, z_loss = options.get("logit_scale", 1.0), options.get("z_loss", 0.0)
    e, c = given.hidden.astype(np.float64), given.head.astype(np.float64)
    bias = np.zeros(len(c)) if given.bias is None else given.bias.astype(np.float64)
    live, v = given.labels >= 0, len(c)
    e, y = e[live], given.labels[live]
    hidden, head = jnp.asarray(e, jnp.bfloat16), jnp.asarray(given.head)
    s = tail.scales_by_sample(hidden, jnp.int32(len(e)), head, v)
    e8 = tail.quantised(hidden, s.hidden_mean, s.hidden)
    c8 = tail.quantised(head, s.head_mean, s.head)
    z8 = float(s.unit) * np.asarray(e8, np.float64) @ np.asarray(c8, np.float64).T
    z8 = z8 + (c @ np.asarray(s.hidden_mean, np.float64))[None, :]
    z8 += ((e - np.asarray(s.hidden_mean)) @ np.asarray(s.head_mean, np.float64))[:, None]
    z8, z = scale * z8 + bias, scale * e @ c.T + bias
    bound: Any = np.maximum(
        np.asarray(logsumexp(z[:, np.unique(y)], axis=1)), math.log(v) + z.mean(1)
    )
    again = (z8 > bound[:, None] + math.log(large)).any(0)
    lse, true = np.zeros(len(live)), np.asarray(stats.lse, np.float64)
    lse[live] = np.maximum(np.asarray(logsumexp(np.where(again, z, z8), axis=1)), bound)
    losses = np.asarray(stats.loss) + np.where(
        live, lse - true + z_loss * (np.square(lse) - np.square(true)), 0.0
    )
    return losses if given.weights is None else losses * given.weights, float(again.mean())
