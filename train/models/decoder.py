"""One decoder for every family: tokens in, hidden states and head out, never logits."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train import mesh
from train.models.attention import Attention, View, view
from train.models.cache import Cache, LayerCache
from train.models.config import LayerKind, Lora, ModelConfig
from train.models.layers import Mlp, RMSNorm, embed, table_init
from train.models.lora import Adapter, HeadAdapter, with_dropout

INPUT = "a block's input"
"""What the backward pass finds by this name, under `remat="block"`."""


class Decoder(nnx.Module):
    """Embedding, blocks of attention and MLP, a last norm.

    The model holds parameters and nothing else: randomness comes in with each call. The blocks
    are one `Block` whose weights have a leading axis of layers, so that the time to compile does
    not grow with their number.

    Args:
        config: the shape.
        rngs: the stream `params` initialises the weights.
    """

    head_adapter: HeadAdapter | None = None

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.weights),
            embedding_init=table_init(config),
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(config.dropout)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tied_head:
            shape = (config.vocab_size, config.hidden_size)
            table = table_init(config)(rngs.params(), shape, jnp.dtype(config.weights))
            self.untied_head = nnx.Param(table)
        if config.lora is not None:  # the last to draw: other weights are the same without it
            self._adapt(config.lora, rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        starts: Int[Array, "B M"] | None = None,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """The hidden states whose product with `head` gives the logits.

        A token attends to itself and to earlier tokens of its row with the same segment number.
        `ModelConfig.final_softcap` bounds the logits: it is the loss's, or the sampler's, to apply.

        Args:
            tokens: token ids in [0, V).
            segments: the segment of each token within its row; 0 marks padding.
            positions: the index of each token within its segment, for RoPE.
            starts: where the segments of each row begin, from left to right, and T where there are
                no more: kernels then skip what no token sees. All segments must be there.
            dropout_key: draws the dropout masks; None turns dropout off (evaluation).
        """
        first_key, keys, head_key = None, None, None
        if dropout_key is not None and self.config.drops:
            first_key, key, head_key = jax.random.split(dropout_key, 3)
            keys = jax.random.split(key, self.config.layers)
        views = {
            kind: view(self.config, kind, segments, positions, starts=starts)
            for kind in self.config.pattern
        }
        stream = _drop(self.dropout, self._embed(tokens), first_key)
        stream, _ = self._through_blocks(stream, views, keys)
        return self._hidden(stream, head_key)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """What `__call__` gives for T tokens that follow those in the cache, and the cache then.

        Segment 1 may have branches: see `Cache`.
        """
        start = cache.length

        def put(old: Int[Array, "B S"], new: Int[Array, "B T"]) -> Int[Array, "B S"]:
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

        past = put(cache.segments, segments), put(cache.positions, positions)
        views = {
            kind: view(self.config, kind, segments, positions, past=past)
            for kind in self.config.pattern
        }
        stream, layers = self._through_blocks(self._embed(tokens), views, cache=cache.layers)
        cache = dataclasses.replace(
            cache,
            layers=layers,
            segments=past[0],
            positions=past[1],
            length=start + tokens.shape[1],
        )
        return self._hidden(stream), cache

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output weights, in the dtype of the activations: logits are hidden · headᵀ.

        Whole on every device, for one call of the loss. An adapter of the head makes it and the
        hidden states wider: D is `ModelConfig.head_columns`.
        """
        rows = self.embedding.embedding if self.config.tied_head else self.untied_head
        head = mesh.whole(self._in_dtype(rows))
        return head if self.head_adapter is None else self.head_adapter.head(head)

    def _adapt(self, lora: Lora, rngs: nnx.Rngs) -> None:
        """Gives new adapters to the projections of all blocks, and to the head, that are named."""
        for name in lora.targets:
            if name == "head":
                rows, size = self.embedding.embedding.shape
                self.head_adapter = HeadAdapter(lora, size, rows, rngs=rngs)
            else:
                part, projection = name.split(".")
                linear = getattr(getattr(self.blocks, part), projection)
                layers, size, out_size = linear.kernel.shape
                linear.adapter = Adapter(lora, size, out_size, layers, rngs=rngs)

    def _hidden(
        self, stream: Float[Array, "B T D"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T D"]:
        hidden = self.norm(stream)
        if self.head_adapter is None:
            return hidden
        return with_dropout(self.head_adapter, key).hidden(hidden)

    def _in_dtype(self, table: nnx.Param) -> Float[Array, "V D"]:
        named = {"embedding.embedding": table[...]}
        (table,) = mesh.cast(named, mesh.of(named), self.config.dtype).values()
        return table.astype(self.config.dtype)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self._in_dtype(self.embedding.embedding)
        embedded = mesh.rows(embed(table, tokens), mesh.of(table))
        if self.config.scaled_embedding:
            embedded *= jnp.asarray(self.config.hidden_size**0.5, embedded.dtype)
        return embedded

    def _through_blocks(
        self,
        stream: Float[Array, "B T D"],
        views: Mapping[LayerKind, View],
        keys: PRNGKeyArray | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """All blocks in order, a group at a time: a loop in the compiled program, or its lines.

        A group is a repetition of the pattern of kinds, or several: within it the kind of each
        block is known when the program is built, so that attention can be given its window as a
        number.
        """
        config, pattern = self.config, self.config.pattern
        scanned = config.scan == "on"

        def one(kind, stream, inputs):
            block, key, before = inputs
            block = mesh.cast(block, mesh.of(block), config.dtype)
            return block(stream, views[kind], key, before)

        def several(stream, layers):
            kept = []
            for layer, kind in zip(_unstack(layers), itertools.cycle(pattern)):
                stream = checkpoint_name(stream, INPUT) if kept else stream  # else the group's own
                stream, after = one(kind, stream, layer)
                kept.append(after)
            return stream, _stack(kept)

        size = len(pattern)
        if config.remat != "none":
            # Groups too, so that of their weights no slices are kept: those are another model.
            policy = jax.checkpoint_policies.save_only_these_names(INPUT)
            if config.remat == "full":
                size *= max(1, round(config.layers**0.5 / size))
                policy = None
            one = jax.checkpoint(one, static_argnums=0, prevent_cse=not scanned or size > 1)
            several = jax.checkpoint(several, policy=policy, prevent_cse=not scanned)

        one = jax.jit(one, static_argnums=0)  # traced once for all blocks of a kind
        looped = config.layers // size * size if scanned else 0
        left = config.layers - looped
        in_loop, written_out = _split((self.blocks, keys, cache), (looped, left))
        kept = []
        if looped and size == 1:
            stream, after = jax.lax.scan(functools.partial(one, pattern[0]), stream, in_loop)
            kept.append(after)
        elif looped:
            groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), in_loop)
            stream, after = jax.lax.scan(several, stream, groups)
            kept.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after))
        sizes = [size] * (left // size) + [left % size] * (left % size > 0)
        for layers in _split(written_out, sizes):
            stream, after = several(stream, layers)
            kept.append(after)
        return stream, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)


def looped(model: Decoder) -> Decoder:
    """The model with its layers as a loop of the program: soon compiled, repeatable on a GPU."""
    model = nnx.merge(*nnx.split(model))
    model.config = dataclasses.replace(model.config, scan="on")
    return model


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma also norms what is added."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config)
        self.mlp = Mlp(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.attention_post_norm = RMSNorm(config.hidden_size, config)
            self.mlp_post_norm = RMSNorm(config.hidden_size, config)

    def __call__(
        self,
        stream: Float[Array, "B T D"],
        view: View,
        dropout_key: PRNGKeyArray | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        keys = [None] * 4 if dropout_key is None else jax.random.split(dropout_key, 4)
        attention, mlp = with_dropout(self.attention, keys[2]), with_dropout(self.mlp, keys[3])
        added, cache = attention(self.attention_norm(stream), view, cache)
        if self.post_norms:
            added = self.attention_post_norm(added)
        stream = stream + _drop(self.dropout, added, keys[0])
        added = mlp(self.mlp_norm(stream))
        if self.post_norms:
            added = self.mlp_post_norm(added)
        return stream + _drop(self.dropout, added, keys[1]), cache


def _drop(
    dropout: nnx.Dropout, x: Float[Array, "B T D"], key: PRNGKeyArray | None
) -> Float[Array, "B T D"]:
    return dropout(x, deterministic=key is None, rngs=key)


def _split(stacked: Any, sizes: Sequence[int]) -> list[Any]:
    """The leaves cut along their leading axis. Their gradients are laid side by side again.

    (Those of slices would be filled up with zeros and added.)
    """
    leaves, structure = jax.tree.flatten(stacked)
    parts = [jax.lax.split(leaf, sizes) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i] for part in parts]) for i in range(len(sizes))]


def _unstack(stacked: Any) -> list[Any]:
    """The trees whose leaves are stacked."""
    size = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x: x[0], part) for part in _split(stacked, [1] * size)]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
