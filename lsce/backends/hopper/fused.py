"""Gradients in the forward pass: the logits are made once, at the price of keeping P for a while.

    P̃_nv = exp(z_nv − r_n)      r_n = z_{n,y} + SHIFT: the target's logit, as a bound of lse_n
    l_n  = Σ_v P̃_nv             lse_n = r_n + log l_n
    dE_n = (a_n / l_n) · Σ_v P̃_nv·C_v            a_n = w_n·(1 + 2λ·lse_n)·scale
    dC_v = Σ_n P̃_nv · (a_n / l_n)·E_n

so that nothing of P has to be touched again once l is known. The target enters as one changed entry
a row, P̃_{n,y} −= w_n(1−β)·scale·l_n / a_n, and the smoothing as rank 1. Where r misses lse by more
than numbers hold, the group's P̃ is made again with r_n = lse_n for those tokens.

Tokens without a loss cost nothing: the others come first, and only their blocks are computed.

P is bfloat16, N·V of it. Up to a size all of it is kept: that of the last columns lies where dC of
those before them will be, which is written later. Beyond that the tokens come in groups, and dC is
carried from one to the next as a sum of two bfloat16 arrays, 16 bits of mantissa, and rounded at
the end.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsce import formula, rounding
from lsce.backends import Arrays
from lsce.backends.hopper.call import Call
from lsce.backends.hopper.forward import run_forward, target_logit
from lsce.backends.hopper.kernels.entries import change_entries
from lsce.backends.hopper.kernels.head_gradient import head_gradient
from lsce.backends.hopper.kernels.hidden_gradient import accumulate_hidden
from lsce.backends.hopper.kernels.lse_forward import LOG2E
from lsce.backends.hopper.kernels.probabilities import Vectors, probabilities
from lsce.problem import cdiv
from lsce.sparse import plan
from lsce.sparse.tokens import BLOCK, arrange, order_tokens
from lsce.varying import varying
from lsce.wanted import Wanted

SHIFT = 16.0
"""Nats above the target's logit at which P̃ is 1: a loss of so many is met exactly. Terms below
e^−71 of the target vanish."""
RANGE = 44.0
"""Nats by which r may miss lse, as it does at no loss below 60. P̃ and l would be finite up to twice
that, but a_n / l_n times a small hidden state must not vanish either."""
LEAST = 1e-30
"""w_n / l_n of a token that r misses: below, a hidden state's entry times it could be no number."""


def refuses(call: Call) -> str | None:
    """Why the gradients are made afterwards, though "fused" wishes or "fp8" allows that they are
    not."""
    p, tiles = call.problem, call.tiles.fused
    if call.low:
        return "logits are in 8 bits"
    if call.fused_layout is None:
        return "8 bits take less time or memory"
    if p.return_stats:
        return "the statistics need a pass of their own"
    if p.has_bias:
        return "there is a bias"
    if call.dense_smoothing:
        return "smoothing under a softcap is not of rank 1"
    if cdiv(p.d, 64) * 64 % tiles.head_d:
        return f"D is no multiple of the tile {tiles.head_d}"
    if call.fused_layout.groups > 1 and p.v % tiles.tile_c:
        return f"V is no multiple of {tiles.tile_c}, and P is too large for all tokens at once"
    return None


class Part(NamedTuple):
    """Some of the column tiles, the first or the others, and where their P is."""

    chunk: int
    tiles: int
    p_ref: Any
    panels: int
    kept_ref: Any

    def entries(
        self, labels: Int[Array, " N"], own: int, blocks: int, tile_c: int
    ) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
        """Row and column of each token's target in p_ref, −1 where it is in another part."""
        token = jnp.arange(labels.shape[0], dtype=jnp.int32)
        tile = labels // tile_c - self.chunk * own
        here = (labels >= 0) & (tile >= 0) & (tile < self.tiles)
        slot = tile * blocks + token // BLOCK
        row = slot // self.panels * BLOCK + token % BLOCK
        column = slot % self.panels * tile_c + labels % tile_c
        return jnp.where(here, row, -1), column

    def steps(self, work: plan.Work) -> list[int]:
        """The chunks of `work` that this part is, in the order in which their dC is written.

        P of the last ones lies where dC of those before them goes.
        """
        return [0] if self.chunk == 0 else [*range(1, work.first_tile.shape[0] - 1)][::-1]


class Tokens(NamedTuple):
    """A group of tokens, in whole pairs of blocks; rows without a loss are 0, their label −1."""

    hidden: Float[Array, "rows D"]
    labels: Int[Array, " rows"]
    weights: Float[Array, " rows"]
    bound: Float[Array, " rows"]
    """r of the formulas above."""
    target: Float[Array, " rows"]
    """The target's logit."""
    in_use: Bool[Array, " rows"]
    """Those with a loss, which come first: the blocks behind them are not computed."""


class Storage(NamedTuple):
    """What all groups write to."""

    parts: list[Part]
    own: int
    """Column tiles of the first part."""
    dh_refs: dict[int, Any]
    """The sums of dE, for groups of so many rows."""
    dhead_ref: Any
    low_ref: Any
    """What rounding cuts off dC, where it is carried from one group to the next."""


def with_gradients(
    call: Call,
    arrays: Arrays,
    weights: Float[Array, " N"],
    wanted: Wanted,
    poison: Float[Array, ""],
) -> tuple[Float[Array, " N"], Arrays]:
    """The losses, dE and dC of their weighted sum, None where nobody asked."""
    hidden, head, labels, _, _ = arrays
    p = call.problem
    rows = arrange(hidden, labels, order_tokens(labels), 2 * BLOCK)
    e, y, n = rows.hidden, rows.labels, rows.hidden.shape[0]
    w = jnp.zeros(n, jnp.float32).at[rows.row_of_token].set(weights, unique_indices=True)
    w = jnp.where(rows.in_use, w, 0.0)
    target = target_logit(call, e, head, None, y)
    r = target + SHIFT
    center, mean_logit = None, jnp.zeros_like(target)
    if p.label_smoothing > 0.0:
        # The mean before P is begun: what it is made from then does not lie beside P.
        center, r = lax.optimization_barrier((jnp.mean(head[: p.v], axis=0, dtype=jnp.float32), r))
        mean_logit = jnp.dot(e.astype(jnp.float32), center, precision="highest") * p.logit_scale

    assert call.fused_layout is not None
    count, own = call.fused_layout
    most = cdiv(n, 2 * BLOCK * count) * 2 * BLOCK
    sizes = {most, n - (count - 1) * most}
    storage = _storage(call, wanted, head, own, sizes, carried=count > 1 and wanted.head)
    tokens = Tokens(e, y, w, r, target, rows.in_use)

    def group(first, size, carry, zero):
        part = tokens
        if size < n:
            # Copies: see `call.padded`.
            some = tuple(lax.dynamic_slice_in_dim(x, first, size) for x in tokens)
            part = Tokens(*lax.optimization_barrier(some))
        lse, dh, zero = _gradients(call, wanted, part, head, center, poison, storage, carry, zero)
        return lse, dh.astype(hidden.dtype), zero

    zero = jnp.int32(0).reshape(1)
    if count == 1:
        lse, dhidden, _ = group(0, n, None, zero)
    else:
        lse, dhidden = _in_groups(group, count, most, storage.low_ref, (target, e), zero)
    lse = jnp.maximum(lse, target)
    losses = formula.token_loss(p, lse, target, mean_logit)
    losses = jnp.where(labels >= 0, losses[rows.row_of_token], 0.0)
    dhidden = dhidden[rows.row_of_token] if wanted.hidden else None
    # Where a scan keeps it it is copied to its place, see `call.padded`.
    dhead = lax.optimization_barrier(storage.dhead_ref[...]) if wanted.head else None
    return losses, Arrays(dhidden, dhead)


def _in_groups(
    group: Callable[..., Any], count: int, most: int, low_ref: Any, like: tuple[Array, Array], zero
) -> tuple[Float[Array, " rows"], Float[Array, "rows D"]]:
    """lse and dE of all tokens, `most` of them at a time, in arrays that begin as those of `like`.

    The first group finds no dC and the last one leaves nothing to carry on; those between them are
    the body of a loop, so that a program is no longer for more of them.
    """
    rows = like[0].shape[0]

    def step(first, size, carry, state):
        lse, dhidden, zero = state
        lse_part, dh_part, zero = group(first, size, carry, zero)
        lse = lax.dynamic_update_slice_in_dim(lse, lse_part, first, 0)
        if dh_part.shape[0]:
            dhidden = lax.dynamic_update_slice_in_dim(dhidden, dh_part, first, 0)
        return varying((lse, dhidden, zero), like=state)

    state = step(0, most, (low_ref, False, True), (*like, zero))
    between = functools.partial(step, size=most, carry=(low_ref, True, True))
    if count > 2:
        state = lax.fori_loop(
            1, count - 1, lambda i, state: between(jnp.int32(i * most), state=state), state
        )
    last = (count - 1) * most
    lse, dhidden, _ = step(last, rows - last, (low_ref, True, False), state)
    return lse, dhidden


def _storage(
    call: Call, wanted: Wanted, head, own: int, sizes: set[int], *, carried: bool
) -> Storage:
    """Buffers for groups of so many tokens; P of `own` column tiles has one for itself."""
    tiles, rows = call.tiles.fused, max(sizes)
    tile_c = tiles.tile_c
    # Made here, as a loop's body forgets what kernels write into buffers of its own.
    dh_refs = {
        size: jax.new_ref(
            lax.empty(
                (tiles.hidden_splits, size, tiles.padded_d(head.shape[1]))
                if wanted.hidden
                else (1, 0, 0),
                jnp.float32,
            )
        )
        for size in sorted(sizes)
    }
    dhead_ref = jax.new_ref(lax.empty(head.shape, head.dtype))
    low_ref = jax.new_ref(lax.empty(head.shape if carried else (16, 64), head.dtype))
    own_ref = jax.new_ref(lax.empty((own * rows, tile_c), head.dtype))
    parts = [Part(0, own, own_ref, 1, jax.new_ref(lax.empty((own * rows,), jnp.float32)))]
    if others := cdiv(call.problem.v, tile_c) - own:
        kept_ref = jax.new_ref(lax.empty((others * rows,), jnp.float32))
        parts.append(Part(1, others, dhead_ref, head.shape[1] // tile_c, kept_ref))
    return Storage(parts, own, dh_refs, dhead_ref, low_ref)


def _gradients(
    call: Call,
    wanted: Wanted,
    tokens: Tokens,
    head,
    center,
    poison,
    storage: Storage,
    carry,
    zero,
):
    """P of a group, then the products: its lse, its rows of dE, and a zero that comes after."""
    p, tiles = call.problem, call.tiles.fused
    rows, d = tokens.hidden.shape
    blocks = rows // BLOCK
    options = {"tiles": tiles, "ctas": call.ctas, "interpret": call.interpret}
    padded_d = tiles.padded_d(d)
    live = (tokens.in_use.sum(dtype=jnp.int32) + BLOCK - 1) // BLOCK
    work = plan.dense_work(
        blocks,
        live,
        cdiv(p.v, tiles.tile_c),
        slots=storage.own * blocks,
        group=tiles.cluster,
        together=tiles.together(d),
        kept=True,
    )
    in_parts = _in_parts(work)
    bound, l = _in_range(call, tokens, head, storage, in_parts, zero)
    lse = bound + jnp.log(l)
    factor = formula.softmax_weight(p, lse) * p.logit_scale
    scale = tokens.weights * factor / l
    slope = formula.softcap_slope(p, tokens.target)
    hit = jnp.exp(tokens.target - bound) * slope
    hit = hit - (1.0 - p.label_smoothing) * p.logit_scale * l / factor * slope
    dh_ref = storage.dh_refs[rows]
    dh_ref[...] = jnp.zeros(dh_ref.shape, jnp.float32)
    for part in storage.parts:
        change_entries(
            part.p_ref,
            *part.entries(tokens.labels, storage.own, blocks, tiles.tile_c),
            hit,
            ctas=call.ctas,
            interpret=call.interpret,
        )
        if wanted.hidden:
            accumulate_hidden(
                part.p_ref,
                head,
                in_parts,
                zero + part.chunk,
                dh_ref,
                gathered=False,
                dense=True,
                panels=part.panels,
                **options,
            )
    s = tokens.weights * p.label_smoothing / p.v * p.logit_scale
    constant = jnp.zeros(padded_d, jnp.float32)
    if p.label_smoothing > 0.0:
        row = jnp.dot(-s, tokens.hidden.astype(jnp.float32), precision="highest")
        constant = jnp.pad(row, (0, padded_d - d))
    scaled = (tokens.hidden.astype(jnp.float32) * scale[:, None]).astype(tokens.hidden.dtype)
    low_ref, add, split = carry or (None, False, False)
    for part in reversed(storage.parts) if wanted.head else ():
        for step in part.steps(work):
            head_gradient(
                None if part.p_ref is storage.dhead_ref else part.p_ref,
                scaled,
                work,
                zero + step,
                constant + poison,
                storage.dhead_ref,
                gathered=False,
                low_ref=low_ref,
                add=add,
                split=split,
                panels=part.panels,
                **options,
            )
    ends = [storage.dhead_ref[0, 0]] if wanted.head else []
    ends += [dh_ref[0, 0, 0]] if wanted.hidden else []
    dh = jnp.zeros((0, d), jnp.float32)
    if wanted.hidden:
        dh = dh_ref[...].sum(0)[:, :d] * scale[:, None]
        lost = rounding.lost(hit, head.dtype) * scale
        dh = dh + rounding.given_back(lost, head, tokens.labels)
        if center is not None:
            dh = dh - (s * p.v)[:, None] * center[None, :]
    return lse, dh, _zero_after(*ends)


def _in_parts(work: plan.Work) -> plan.Work:
    """The same in a chunk for each part: only dC has to be written in more steps."""
    ends = np.unique([0, 1, work.first_tile.shape[0] - 1])
    return work._replace(
        first_tile=work.first_tile[ends],
        first_item=work.first_item[ends],
        first_of_block=work.first_of_block[ends],
    )


def _in_range(
    call: Call, tokens: Tokens, head, storage: Storage, work: plan.Work, zero
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Writes P̃ of a group; r, and l within the range of it.

    The second time there is nothing to do but where a token was beyond it, and then the forward
    kernel says what its lse is. No step of the host's depends on that: both kernels are given no
    tokens, and end at once.
    """
    l = _probabilities(call, tokens, head, storage, work, zero)
    beyond = ~(jnp.abs(jnp.log(l)) <= RANGE)  # NaN too
    small = (jnp.abs(tokens.weights) < LEAST * l) & (tokens.weights != 0.0)
    beyond |= (l > 1.0) & small
    live = jnp.where(beyond.any(), tokens.in_use.sum(dtype=jnp.int32), 0)
    lse = run_forward(call, tokens.hidden, head, None, None, live).lse
    r = jnp.where(beyond & jnp.isfinite(lse), lse, tokens.bound)
    work = work._replace(first_item=jnp.where(live > 0, work.first_item, 0))
    return r, _probabilities(call, tokens._replace(bound=r), head, storage, work, zero)


def _probabilities(
    call: Call, tokens: Tokens, head, storage: Storage, work: plan.Work, zero
) -> Float[Array, " rows"]:
    """Writes P̃ of the pairs in `work`; l of all that is written by now, 1 for unused rows."""
    p, rows = call.problem, tokens.hidden.shape[0]
    ones, l = jnp.ones(rows, jnp.float32), jnp.zeros(rows, jnp.float32)
    no_target = jnp.full(rows, -1, jnp.int32)
    vectors = Vectors(tokens.bound * LOG2E, ones, l, l, ones, no_target)
    for part in storage.parts:
        probabilities(
            tokens.hidden,
            head,
            None,
            vectors,
            work,
            zero + part.chunk,
            part.p_ref,
            part.kept_ref,
            tiles=call.tiles.fused,
            gathered=False,
            scale=p.logit_scale,
            softcap=p.softcap,
            smooth=False,
            v=p.v,
            panels=part.panels,
            only_p=True,
            ctas=call.ctas,
            interpret=call.interpret,
        )
        # Slots are column tile · blocks + block.
        l = l + part.kept_ref[: part.tiles * rows].reshape(part.tiles, rows).sum(0)
    return jnp.where(tokens.in_use, l, 1.0)  # where nobody wrote there may be anything


def _zero_after(*ends: Array) -> Int[Array, " 1"]:
    """0, known once these results of the products are: the next group's P then overwrites this one.

    Without that dependency XLA would copy P, in fear of overwriting what is still to be read.
    """
    halves = [
        lax.bitcast_convert_type(end, jnp.uint16).astype(jnp.uint32)
        if end.dtype.itemsize == 2
        else lax.bitcast_convert_type(end, jnp.uint32) >> 16
        for end in ends
    ]
    return (functools.reduce(operator.add, halves) >> 17).astype(jnp.int32).reshape(1)
