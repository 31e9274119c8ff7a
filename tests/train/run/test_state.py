"""How a run begins: what its seed decides."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from train.models.config import PRESETS, Lora
from train.run.optimizer import adamw
from train.run.state import state_maker

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_a_seed_decides_weights_adapters_and_dropout_each_by_a_key_of_its_own():
    shape = dataclasses.replace(
        PRESETS["nano"], vocab_size=40, lora=Lora(2, 2.0, ("attention.query",))
    )
    create = state_maker(shape, adamw(beta1=0.9, beta2=0.9, weight_decay=0.0, clip_norm=1.0), None)

    def drawn(seed: int) -> list[np.ndarray]:
        state = create(seed)
        params = state.params
        leaves = params["embedding"], params["blocks"]["attention"]["query"]
        return [np.asarray(x) for x in (*jax.tree.leaves(leaves), jax.random.key_data(state.key))]

    first, again, other = drawn(0), drawn(0), drawn(1)
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.any(one) or not np.array_equal(one, different)  # B begins as 0
    assert sum(map(np.any, first)) == len(first) - 1
    assert not np.array_equal(first[-1], jax.random.key_data(jax.random.key(0)))
