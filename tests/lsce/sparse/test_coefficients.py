"""The factors of the gradient's terms, against JAX's own derivative of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_on_cpu import problem

from lsce import formula
from lsce.sparse.coefficients import coefficients

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("mean_square", [False, True])
def test_they_make_the_derivative(cap, mean_square):
    p = problem(n=3, v=7, label_smoothing=0.2, z_loss=0.01, softcap=cap, logit_scale=0.5)
    rng = np.random.default_rng(0)
    product, g = jnp.asarray(rng.standard_normal((3, 7)) * 4, jnp.float32), jnp.arange(1.0, 4.0)
    labels = jnp.array([6, 0, 3])

    def loss(product):
        z = formula.logits(p, product, None)
        target = jnp.take_along_axis(z, labels[:, None], 1)[:, 0]
        return formula.token_loss(p, jax.nn.logsumexp(z, 1), target, z.mean(1)) @ g

    z = formula.logits(p, product, None)
    row_of_token = jnp.array([2, 0, 1])

    def by_row(x):
        return jnp.full(5, jnp.nan).at[row_of_token].set(x)

    c = coefficients(
        p,
        g,
        jnp.float32(0.0),
        row_of_token=row_of_token,
        live=jnp.int32(3),
        lse=by_row(jax.nn.logsumexp(z, 1)),
        mean_square_logit=by_row((z**2).mean(1)) if mean_square else None,
    )
    lse, a, b, s, kappa = (x[row_of_token][:, None] for x in c[:5])
    slope = formula.softcap_slope(p, z)
    hit = jax.nn.one_hot(labels, 7) * b
    dz = (a * jnp.exp(z - lse) - hit) * slope - s * (slope - kappa) - s * kappa
    np.testing.assert_allclose(dz, jax.grad(loss)(product), atol=1e-5)
    assert np.isinf(c.lse[3:]).all()
    assert not np.any(c.a[3:])  # NaN counts as True
