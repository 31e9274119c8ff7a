"""Training on a real GPU: two processes that take the same steps end with the same bits."""

import subprocess
import sys

import jax
import pytest
from paths import ROOT

STEPS = """
import dataclasses, hashlib, sys

import jax, numpy as np, optax
from flax import nnx

from train.models.decoder import Decoder
from train.data.packing import IGNORE
from train.models.config import PRESETS
from train.run.options import LossOptions, StepOptions
from train.run.state import TrainState
from train.run.step import train_step

ROWS, LENGTH = 16, 256
flash = {"head_size": 64, "scan": "off"} if sys.argv[2] == "flash" else {}
shape = dataclasses.replace(PRESETS["tiny"], dtype="bfloat16", dropout=0.1, **flash)
model = Decoder(shape, rngs=nnx.Rngs(0))
state = TrainState.create(model, optax.scale_by_adam(), jax.random.key(0))
random = np.random.default_rng(0)
tokens = random.integers(0, 50, (ROWS, LENGTH), dtype=np.int32)  # so that gradients meet in rows
batch = {
    "tokens": tokens,
    "labels": np.where(random.random((ROWS, LENGTH)) < 0.8, tokens, IGNORE).astype(np.int32),
    "segments": np.ones((ROWS, LENGTH), np.int32),
    "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
}
if flash:
    batch["segments"][:, 100:] = 2
    batch["positions"][:, 100:] -= 100
    batch["starts"] = np.tile(np.array([0, 100], np.int32), (ROWS, 1))
loss, how = LossOptions(implementation=sys.argv[1]), StepOptions(batch_size=ROWS)
for _ in range(5):
    state, metrics = train_step(state, batch, 1e-3, loss, how)
weights = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params))
print(float(metrics.loss), hashlib.sha256(weights).hexdigest())
"""


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(
    ("implementation", "attention"), [("auto", "auto"), ("chunked", "auto"), ("auto", "flash")]
)
def test_a_step_is_the_same_in_every_process(implementation, attention):
    ends = [
        subprocess.run(
            [sys.executable, "-c", STEPS, implementation, attention],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert ends[0] == ends[1]
    assert 0 < float(ends[0].split()[0]) < 20
