"""Log-likelihoods of continuations: what a model thinks of each choice of a question.

A question is a tree. Its trunk is the context; its branches are the choices, which go on from the
trunk side by side in one row and do not see each other. Where the contexts of many questions begin
alike, as after the same solved examples, that beginning goes through the model once, and its keys
and values serve all of them. Only the hidden states that predict a choice's token meet the head,
in the fused loss: no logits are kept.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

import lsce
from train.data.packing import IGNORE
from train.mesh import REPEATABLE
from train.models.cache import Cache
from train.models.decoder import Decoder

SHORTEST = 64
"""Rows of fewer tokens are filled up; beginnings of fewer are not worth a cache."""
MANY = 8192
"""Tokens in a batch from which padding costs less than another program's compilation."""
CACHED = 4
"""Times as many tokens as go through the model may be in the caches of their rows."""
FEWEST_TARGETS = 256
"""Predictions that go through the head together, at least: one program for small batches."""


class Tree(NamedTuple):
    """A context and what may follow it, as tokens."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Likelihood(NamedTuple):
    """How likely each of the K continuations of a tree is."""

    log_prob: Float[np.ndarray, " K"]
    """Σ log p of its tokens given the context and those before, nats."""
    greedy: Bool[np.ndarray, " K"]
    """Whether each of its tokens is the likeliest."""


def log_likelihoods(
    model: Decoder,
    trees: Sequence[Tree],
    groups: Sequence[Any],
    *,
    batch_tokens: int,
    known: Set[int] = frozenset(),
) -> Iterator[dict[int, Likelihood]]:
    """The likelihoods of the trees by index, a batch at a time, in an order that suits the device.

    The softcap of the model's logits is applied; dropout is off.

    Args:
      model: the decoder.
      trees: each with a context and continuations of at least one token.
      groups: contexts of the same group may begin alike.
      batch_tokens: how many tokens, padding included, go through the model together, if one row has
        no more.
      known: indices whose likelihoods nobody needs. Batches of nothing else are passed over; what
        is in the others is the same to the bit, as batches do not depend on this.

    Raises:
      ValueError: for an empty context or continuation.
    """
    for i, tree in enumerate(trees):
        if not len(tree.context) or not all(map(len, tree.continuations)):
            raise ValueError(f"tree {i} has an empty context or continuation: {tree}")
    # What is repeatable on a GPU is a loop over the blocks, whatever the training step is.
    model = nnx.merge(*nnx.split(model))
    model.config = dataclasses.replace(model.config, scan="on", remat="none")
    graphdef, params = nnx.split(model)
    programs = _programs(graphdef, _like(params))
    batches = [b for b in plan(trees, groups, batch_tokens) if not b.trees.keys() <= known]
    prefix, past = None, None
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as compiling:
        for batch in batches:  # the first ones run while the others are compiled
            programs.begin(batch, compiling)
        for batch in batches:
            if past is None or batch.prefix != prefix:
                prefix, past = batch.prefix, programs.past(params, batch)
            yield programs.score(params, batch, past)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of trees without their common beginning; rows beyond the trees are padding."""

    prefix: tuple[int, ...]
    """Tokens that all contexts begin with."""
    trees: dict[int, Tree]
    """By index, in the order of the rows."""
    rows: int
    length: int
    past_size: int
    """Room for the beginning, filled up."""


def plan(trees: Sequence[Tree], groups: Sequence[Any], batch_tokens: int) -> Iterator[Batch]:
    """The batches: the trees of a group by length, the longest first, in rows of few lengths.

    Groups whose contexts begin alike for too few tokens are batched together.
    """
    members: dict[Any, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for indices in members.values():
        prefix = common_beginning([trees[i].context for i in indices])
        long = len(prefix) >= SHORTEST and len(indices) > 1
        alike[tuple(prefix) if long else ()] += indices
    most_rows = 1 << max(len(trees) - 1, 0).bit_length()
    many = batch_tokens >= MANY
    for prefix, indices in alike.items():
        past = size(len(prefix), many) if prefix else 0
        lengths = {i: _own_length(trees[i]) - len(prefix) for i in indices}
        order = sorted(indices, key=lambda i: -lengths[i])
        while order:
            length = size(lengths[order[0]], many)
            rows = min(batch_tokens // length, CACHED * batch_tokens // (past + length), most_rows)
            rows = max(1, rows)
            batch, order = order[:rows], order[rows:]
            yield Batch(prefix, {i: trees[i] for i in batch}, rows, length, past)


def common_beginning(contexts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The longest beginning of all of them that leaves each at least one token."""
    first, last = min(map(list, contexts)), max(map(list, contexts))
    most = min(map(len, contexts)) - 1
    same = next((n for n in range(most) if first[n] != last[n]), most)
    return first[:same]


def size(length: int, many: bool = False) -> int:
    """The least 2ᵏ or, unless batches have many tokens, 3·2ᵏ⁻¹ that is not below."""
    least = (4 if many else 1) * SHORTEST
    power = 1 << max(length - 1, least - 1).bit_length()
    halfway = power * 3 // 4
    return halfway if length <= halfway and power > least and not many else power


def _own_length(tree: Tree) -> int:
    """Tokens of a row: the last one of a continuation is predicted and not read."""
    return len(tree.context) + sum(len(c) - 1 for c in tree.continuations)


class _Rows(NamedTuple):
    """A batch as arrays, and where in it each token of each continuation is predicted."""

    tokens: Int[np.ndarray, "B T"]
    segments: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    place: Int[np.ndarray, " M"]
    """Row · T + column of the hidden state."""
    label: Int[np.ndarray, " M"]
    owner: Int[np.ndarray, " M"]
    """The continuation that the label is of, counted through the batch."""


def _lay_out(batch: Batch) -> _Rows:
    tokens, segments, positions = np.zeros((3, batch.rows, batch.length), np.int32)
    place, label, owner = [], [], []
    continuation = 0
    for row, tree in enumerate(batch.trees.values()):
        trunk = tree.context[len(batch.prefix) :]
        at, start, end = 0, len(batch.prefix), len(tree.context)
        parts = [(1, start, trunk)]
        parts += [(k, end, c[:-1]) for k, c in enumerate(tree.continuations, 2)]
        for segment, position, part in parts:
            there = slice(at, at + len(part))
            tokens[row, there] = part
            segments[row, there] = segment
            positions[row, there] = np.arange(position, position + len(part))
            if segment > 1:
                whole = tree.continuations[segment - 2]
                columns = [len(trunk) - 1, *range(at, at + len(part))]
                place += [row * batch.length + column for column in columns]
                label += whole
                owner += [continuation] * len(whole)
                continuation += 1
            at += len(part)
    return _Rows(
        tokens, segments, positions, *(np.array(x, np.int32) for x in (place, label, owner))
    )


def _targets(batch: Batch) -> int:
    """Predictions of a batch, filled up: of one with many tokens to the next 4ᵏ, else 2ᵏ."""
    count = sum(len(c) for tree in batch.trees.values() for c in tree.continuations)
    step = 2 if batch.rows * batch.length >= MANY else 1
    doublings = (max(count - 1, 0) // FEWEST_TARGETS).bit_length()
    return FEWEST_TARGETS << -(-doublings // step) * step


class _Like(NamedTuple):
    """Shapes and dtypes of weights, which can be compared."""

    tree: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]


def _like(params: nnx.State) -> _Like:
    leaves, tree = jax.tree.flatten(params)
    return _Like(tree, tuple(map(jax.typeof, leaves)))


@functools.lru_cache(1)
def _programs(graphdef: nnx.GraphDef[Decoder], like: _Like) -> _Programs:
    """Those of the model before, if it differs in nothing but its weights."""
    return _Programs(graphdef, jax.tree.unflatten(*like))


class _Programs:
    """A model's programs, each compiled once, whatever its weights are."""

    def __init__(self, graphdef: nnx.GraphDef[Decoder], params: nnx.State) -> None:
        self.graphdef, self.like = graphdef, params
        """The weights' shapes and dtypes alone."""
        self.config = nnx.merge(graphdef, params).config
        self.compiled: dict[Any, concurrent.futures.Future[Any]] = {}

    def begin(self, batch: Batch, pool: concurrent.futures.Executor) -> None:
        """Has what a batch needs compiled, if it is not yet."""
        past = jax.eval_shape(lambda: Cache.empty(self.config, 1, batch.past_size))
        if past.segments.size and ("past", batch.past_size) not in self.compiled:
            row = jax.ShapeDtypeStruct((1, batch.past_size), jnp.int32)
            lowered = _read.lower(self.graphdef, self.like, row, row, row)
            self.compiled["past", batch.past_size] = pool.submit(lowered.compile)
        if (key := (batch.past_size, batch.rows, batch.length)) not in self.compiled:
            rows = jax.ShapeDtypeStruct((batch.rows, batch.length), jnp.int32)
            lowered = _hidden.lower(self.graphdef, self.like, past, rows, rows, rows)
            self.compiled[key] = pool.submit(lowered.compile)
        if (targets := _targets(batch)) not in self.compiled:
            width = self.config.hidden_size
            hidden = jax.ShapeDtypeStruct((targets, width), jnp.dtype(self.config.dtype))
            label = jax.ShapeDtypeStruct((targets,), jnp.int32)
            lowered = _predict.lower(self.graphdef, self.like, hidden, label)
            self.compiled[targets] = pool.submit(lowered.compile)

    def past(self, params: nnx.State, batch: Batch) -> Cache:
        """The keys and values of a batch's common beginning."""
        length, filled = len(batch.prefix), batch.past_size
        if not length:
            return Cache.empty(self.config, 1, 0)
        index = np.arange(filled, dtype=np.int32)[None]
        tokens = np.pad(np.array([batch.prefix], np.int32), ((0, 0), (0, filled - length)))
        there = (index < length).astype(np.int32)
        read = self.compiled["past", filled].result()
        return read(params, tokens, there, index * there)

    def score(self, params: nnx.State, batch: Batch, past: Cache) -> dict[int, Likelihood]:
        rows = _lay_out(batch)
        forward = self.compiled[batch.past_size, batch.rows, batch.length].result()
        hidden = forward(params, past, rows.tokens, rows.segments, rows.positions)
        count = len(rows.label)
        targets = _targets(batch)
        missing = targets - count
        hidden = hidden[np.pad(rows.place, (0, missing))]
        label = np.pad(rows.label, (0, missing), constant_values=IGNORE)
        predict = self.compiled[targets].result()
        found = jax.device_get(predict(params, hidden, label))
        log_prob, likeliest = (np.asarray(x)[:count] for x in found)
        total = np.bincount(rows.owner, log_prob)
        greedy = np.bincount(rows.owner, ~likeliest) == 0
        likelihoods, at = {}, 0
        for i, tree in batch.trees.items():
            these = slice(at, at + len(tree.continuations))
            likelihoods[i] = Likelihood(total[these], greedy[these])
            at = these.stop
        return likelihoods


@functools.partial(jax.jit, static_argnames="graphdef", compiler_options=REPEATABLE)
def _read(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "1 S"],
    segments: Int[Array, "1 S"],
    positions: Int[Array, "1 S"],
) -> Cache:
    """A cache that holds exactly these tokens."""
    model = nnx.merge(graphdef, params)
    empty = Cache.empty(model.config, 1, tokens.shape[1])
    return model.extend(tokens, segments, positions, empty)[1]


@functools.partial(jax.jit, static_argnames="graphdef", compiler_options=REPEATABLE)
def _hidden(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    past: Cache,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B·T D"]:
    """The hidden states of rows that all go on from the one row of a cache."""
    model = nnx.merge(graphdef, params)
    rows, length = tokens.shape
    hidden, _ = model.extend(tokens, segments, positions, past.shared(rows, length))
    return hidden.reshape(rows * length, -1)


@functools.partial(jax.jit, static_argnames="graphdef", compiler_options=REPEATABLE)
def _predict(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    hidden: Float[Array, "M D"],
    labels: Int[Array, " M"],
) -> tuple[Float32[Array, " M"], Bool[Array, " M"]]:
    """log p of each label, and whether it is the likeliest token."""
    model = nnx.merge(graphdef, params)
    _, stats = lsce.linear_cross_entropy(
        hidden,
        model.head,
        labels,
        ignore_index=IGNORE,
        softcap=model.config.final_softcap,
        reduction="none",
        return_stats=True,
    )
    return stats.target_logit - stats.lse, stats.correct
