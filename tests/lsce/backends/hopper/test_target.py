"""What rounding does to the target's entry of P, and what dE gets back of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Case, case, ours
from hopper_on_cpu import CANDIDATE

from lsce.backends import hopper
from lsce.backends.hopper import target

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_rounded_off_is_what_a_conversion_loses():
    entry = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    stored = entry.astype(jnp.bfloat16).astype(np.float32)
    lost = jax.jit(target.rounded_off, static_argnums=1)(entry, jnp.bfloat16)
    assert (np.asarray(lost) == entry - stored).all()
    assert (np.asarray(lost) != 0).mean() > 0.9


def test_what_is_no_number_loses_nothing():
    entry = jnp.array([np.nan, np.inf, -np.inf, 3.4e38, 0.0])
    assert (np.asarray(target.rounded_off(entry, jnp.bfloat16)) == 0.0).all()


def test_a_row_that_loses_nothing_is_not_pulled_by_what_the_head_holds():
    head = jnp.array([[np.inf, np.nan], [1.0, 2.0]], jnp.bfloat16)
    labels = jnp.array([0, 1, -1])
    pulled = target.pull(jnp.array([0.0, 0.5, 0.0]), head, labels)
    assert np.asarray(pulled).tolist() == [[0.0, 0.0], [0.5, 1.0], [0.0, 0.0]]


def likely_labels(this: Case) -> Case:
    """The same with labels drawn by what the logits say of them, as a model's are."""
    hidden, head, labels, bias, _ = this.inputs
    z = hidden.astype(np.float32) @ head.astype(np.float32).T
    if bias is not None:
        z = z + bias.astype(np.float32)
    if cap := this.options.get("softcap"):
        z = cap * np.tanh(z / cap)
    drawn = (z + np.random.default_rng(0).gumbel(size=z.shape)).argmax(1)
    labels = np.where(labels >= 0, drawn, labels).astype(np.int32)
    return Case(this.inputs._replace(labels=labels), this.options)


@pytest.mark.slow
@pytest.mark.parametrize("gradient_filter", [None, "fused", 2.0**-12])
@pytest.mark.parametrize(
    "options",
    [{"spread": 3.0}, {"spread": 2.0, "softcap": 5.0}, {"spread": 3.0, "bias": True}],
    ids=["plain", "softcap", "bias"],
)
def test_hidden_gradients_are_little_further_off_than_their_own_rounding(
    gradient_filter, options, monkeypatch
):
    this = likely_labels(case((150, 64, 600), "bfloat16", label_smoothing=0.1, **options))
    true = this.truth.grads["hidden"]

    def error(got) -> float:
        return float(np.linalg.norm(got.astype(np.float64) - true) / np.linalg.norm(true))

    def measured() -> float:
        with hopper.interpreted():
            got = ours(CANDIDATE, this.inputs, **this.options, gradient_filter=gradient_filter)
        return error(got.grads["hidden"])

    rounded = error(true.astype(jnp.bfloat16))
    given_back = measured()
    jax.clear_caches()
    monkeypatch.setattr(target, "rounded_off", lambda entry, dtype: jnp.zeros_like(entry))
    kept = measured()
    assert given_back < 1.25 * rounded
    assert kept > 1.35 * rounded
