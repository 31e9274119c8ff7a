"""Sums over some columns and over the others make those over all."""

import jax.numpy as jnp
import numpy as np
import pytest

from lsce.backends.hopper.kernels import combine

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_sums_that_are_handed_over_join():
    """Those of some columns and of the others, against those of all."""
    x = np.random.default_rng(0).normal(size=(5, 40)) * 4
    x[0, 30] = x[0, 3] = 20.0
    k = 1.3

    def sums(part: slice):
        y, m = x[:, part], x[:, part].max(1)
        log_p = (y - m[:, None]) * k
        p = 2**log_p
        kept = (p * (log_p > -4)).sum(1)
        values = m, p.sum(1), y.sum(1), (p * log_p).sum(1), (p * p).sum(1), kept, (y * y).sum(1)
        named = dict(zip(("m", "l", "s", "w", "q", "kept", "squares"), values, strict=True))
        first = y.argmax(1) + (part.start or 0)
        return {name: jnp.float32(v) for name, v in named.items()} | {"best": jnp.int32(first)}

    a, b, both = sums(slice(0, 17)), sums(slice(17, 40)), sums(slice(0, 40))
    # What was kept is relative to no common bound here: by the rule of `l`.
    both["kept"] = a["kept"] * 2 ** ((a["m"] - both["m"]) * k)
    both["kept"] += b["kept"] * 2 ** ((b["m"] - both["m"]) * k)
    for joined in (combine.join(a, b, k), combine.join(b, a, k)):
        assert joined.keys() == both.keys()
        for name, value in both.items():
            np.testing.assert_allclose(joined[name], value, rtol=2e-5, err_msg=name)
