"""The loop over chunks of columns: P of a chunk, then its part of each gradient.

    dE_n = Σ_v P_nv·C_v      dC_v = Σ_n P_nv·E_n      db_v = Σ_n P_nv / scale

P lies in one buffer, which every chunk reuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsce.backends.hopper.call import Call
from lsce.backends.hopper.forward import Saved
from lsce.backends.hopper.kernels.head_gradient import head_gradient
from lsce.backends.hopper.kernels.hidden_gradient import accumulate_hidden
from lsce.backends.hopper.kernels.lse_forward import LOG2E, LOWEST
from lsce.backends.hopper.kernels.probabilities import Vectors, probabilities
from lsce.backends.hopper.tiles import BackwardTiles
from lsce.sparse.coefficients import Coefficients
from lsce.sparse.plan import Work
from lsce.sparse.tokens import BLOCK
from lsce.wanted import Wanted

SoFar = Callable[[Any], None]


class Products(NamedTuple):
    """Sums over P: rows of dE, dC with the constant row, column sums; () where nobody asked."""

    hidden: Any
    head: Any
    bias: Any
    kept: Float[Array, " rows"]
    """The probability that the computed tiles hold, those of 16 bits."""
    tail: Float[Array, " rows"] | None = None
    """Σ_v T of the tail, where there is one."""


class Loop:
    """What all chunks share: the buffer of P, the sums of dE, and the three kernels on them."""

    def __init__(
        self,
        call: Call,
        saved: Saved,
        c: Coefficients,
        wanted: Wanted,
        tiles: BackwardTiles,
        slots: int,
        work: Work,
        target: Int[Array, " rows"],
        *,
        gathered: bool,
    ) -> None:
        p = call.problem
        rows, d = saved.hidden.shape
        self.call, self.saved, self.wanted = call, saved, wanted
        self.tiles, self.slots, self.work, self.gathered = tiles, slots, work, gathered
        # Nobody reads κ where smoothing is of rank 1; as a constant it would be filled every chunk.
        kappa = c.kappa if call.dense_smoothing else c.s
        self.vectors = Vectors(c.lse * LOG2E, c.a, c.b, c.s, kappa, target)
        self.options: dict[str, Any] = {
            "tiles": tiles,
            "ctas": call.ctas,
            "interpret": call.interpret,
        }
        self.padded_d = padded_d = tiles.padded_d(d)
        if call.tail:
            self.padded_d = padded_d = max(padded_d, call.tiles.tail.padded_d(d))
        # dL/dC of a column that no tile holds: the smoothing alone, the same for all of them.
        self.constant = jnp.zeros(padded_d, jnp.float32)
        if p.label_smoothing > 0.0 and wanted.head:
            row = jnp.dot(-c.s * c.kappa, saved.hidden.astype(jnp.float32), precision="highest")
            self.constant = jnp.pad(row, (0, padded_d - d))
        self.constant = self.constant + c.poison
        self.p_ref = jax.new_ref(lax.empty((slots * BLOCK, tiles.tile_c), saved.hidden.dtype))
        self.kept_ref = jax.new_ref(lax.empty((slots * BLOCK,), jnp.float32))
        sums = (tiles.hidden_splits, rows, padded_d) if wanted.hidden else (1, 0, 0)
        self.dh_ref = jax.new_ref(jnp.zeros(sums, jnp.float32))

    def products(self, chunk, head, bias, dhead_ref, so_far: SoFar | None = None) -> None:
        """P of a chunk and what follows from it; `head` is the whole head or the chunk's rows.

        Where dC has been begun, with its constant row, `so_far` brings what there is of it to
        dhead_ref, for which it has to wait for the reference that it is given.
        """
        p, saved = self.call.problem, self.saved
        at = jnp.asarray(chunk, jnp.int32).reshape(1)
        probabilities(
            saved.hidden,
            head,
            bias,
            self.vectors,
            self.work,
            at,
            self.p_ref,
            self.kept_ref,
            gathered=self.gathered,
            scale=p.logit_scale,
            softcap=p.softcap,
            smooth=self.call.dense_smoothing,
            v=p.v,
            **self.options,
        )
        same: dict[str, Any] = {"gathered": self.gathered} | self.options
        if self.wanted.hidden:
            accumulate_hidden(
                self.p_ref, head, self.work, at, self.dh_ref, dense=not self.gathered, **same
            )
        constant = self.constant
        if self.wanted.head:
            same["after"] = self.dh_ref if self.wanted.hidden else None
            if so_far is not None:
                so_far(self.dh_ref if self.wanted.hidden else self.p_ref)
                same["add"] = True
                constant = jnp.zeros_like(constant)
            head_gradient(self.p_ref, saved.hidden, self.work, at, constant, dhead_ref, **same)

    def dhidden(self) -> Float[Array, "rows D"]:
        return self.dh_ref[...].sum(0)[:, : self.saved.hidden.shape[1]]

    def column_sums(self, chunk, most: int) -> Float[Array, " columns"]:
        """Σ_n P by column of a chunk's first `most` tiles, 0 for tiles it does not have."""
        work, slots = self.work, self.slots
        t = work.first_tile[chunk] + jnp.arange(most)
        mine = t < work.first_tile[chunk + 1]
        t = jnp.minimum(t, work.tile_slot.shape[0] - 1)
        first, slot = work.tile_slot[t][:, None], jnp.arange(slots)[None, :]
        owns = (slot >= first) & (slot < first + work.of_tile_count[t][:, None]) & mine[:, None]
        sums = self.p_ref[...].reshape(slots, BLOCK, -1).sum(1, dtype=jnp.float32)
        # A slot in no tile of the chunk holds whatever was there. A product joins the slots of a
        # tile and not a scatter, whose order of adding nobody fixes.
        sums = jnp.where(owns.any(0)[:, None], sums, 0.0)
        return jnp.dot(owns.astype(jnp.float32), sums, precision="highest").reshape(-1)

    def mass(self, chunk, most: int) -> Float[Array, " rows"]:
        """The probability that a chunk's tiles hold, by row."""
        work = self.work
        first, after = work.first_of_block[chunk], work.first_of_block[chunk + 1]
        at = first[:, None] + jnp.arange(most)[None, :]
        within = (at < after[:, None])[..., None]
        at = jnp.minimum(at, work.of_block.shape[1] - 1)
        slot = jnp.take_along_axis(work.of_block_slot, at, axis=1)
        by_tile = self.kept_ref[...].reshape(-1, BLOCK)[jnp.clip(slot, 0, self.slots - 1)]
        return jnp.where(within, by_tile, 0.0).sum(1).reshape(-1)


def live_blocks(saved: Saved) -> Int[Array, ""]:
    """Blocks of tokens with a loss."""
    return (saved.live + BLOCK - 1) // BLOCK


def finite_bias(saved: Saved) -> Float[Array, " V"] | None:
    """The bias with the forward's finite number in place of −∞: 0 · −∞ is NaN."""
    if saved.bias is None:
        return None
    return jnp.maximum(saved.bias.astype(jnp.float32), LOWEST)
