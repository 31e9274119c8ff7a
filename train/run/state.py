"""All that training changes, and how a run begins: random weights, or those in files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from train import mesh
from train.models.config import ModelConfig
from train.models.decoder import Decoder
from train.models.resolve import Pretrained
from train.run.trained import divide

StateMaker = Callable[[int], "TrainState"]
"""Makes a new run's state from its seed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as one pytree; the static fields say how to read it."""

    step: Int[Array, ""]
    """Updates done so far."""
    params: nnx.State
    """The model's weights."""
    opt_state: optax.OptState
    """The optimizer's, of the weights that are trained and in their dtypes."""
    key: PRNGKeyArray
    """Decides dropout and rounding. It never changes: a step's is of it and the step's number."""
    graphdef: nnx.GraphDef[Decoder] = dataclasses.field(metadata={"static": True})
    optimizer: optax.GradientTransformation = dataclasses.field(metadata={"static": True})
    """Its updates are multiplied by the learning rate and taken from the weights."""
    frozen: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    """The names of the weights that stay as they are: they get no gradient and no moments."""

    @classmethod
    def create(
        cls,
        model: Decoder,
        optimizer: optax.GradientTransformation,
        key: PRNGKeyArray,
        frozen: tuple[str, ...] = (),
    ) -> TrainState:
        graphdef, params = nnx.split(model)
        opt_state = optimizer.init(divide(params, frozen)[0])
        return cls(jnp.int32(0), params, opt_state, key, graphdef, optimizer, frozen)

    @property
    def model(self) -> Decoder:
        return nnx.merge(self.graphdef, self.params)


@functools.cache
def state_maker(
    shape: ModelConfig,
    optimizer: optax.GradientTransformation,
    on: Mesh | None,
    frozen: tuple[str, ...] = (),
) -> StateMaker:
    """The compiled function that makes a new run's state from its seed, each share in its place."""

    def create(seed: int) -> TrainState:
        weights, dropout = jax.random.split(jax.random.key(seed))
        model = Decoder(shape, rngs=nnx.Rngs(params=weights))
        return TrainState.create(model, optimizer, dropout, frozen)

    like = jax.eval_shape(create, 0)
    return jax.jit(create, out_shardings=mesh.shardings(like, on))


def first_state(source: Pretrained, create: StateMaker, seed: int, on: Mesh | None) -> TrainState:
    """A new run's state, with the weights in files in place of random ones."""
    like = jax.eval_shape(create, seed)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=mesh.shardings(like, on))
    def complete(params: nnx.State, seed: int) -> TrainState:
        new = create(seed)  # of its weights XLA makes only those that no file has, as adapters
        model = nnx.merge(new.graphdef, nnx.merge_state(new.params, params))
        return TrainState.create(model, new.optimizer, new.key, new.frozen)

    return complete(source.load(on, dtype=like.model.config.weights), seed)
