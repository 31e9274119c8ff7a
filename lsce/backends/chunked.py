"""The loss in plain XLA, tile by tile: exact, on any device, with no N×V array in either direction.

A tile is some tokens × some classes. The forward pass keeps only sums over the classes; the
backward pass makes the tile's logits again, and from its dz the tile's parts of the gradients. The
loop over classes is the outer one there, so that dC of a strip of classes is complete, summed over
all tokens in float32 and rounded once, before the next strip begins; dE is summed in float32.
Nothing is scattered, so equal inputs give equal bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lsce import formula, rounding
from lsce.backends import Arrays, Outputs
from lsce.primitive import primitive
from lsce.problem import Problem, cdiv
from lsce.sums import LogitSums
from lsce.wanted import Wanted


class Chunked:
    name = "chunked"
    twice_differentiable = True

    def refuses(self, problem: Problem) -> str | None:
        return None

    def call(self, problem: Problem) -> "Call":
        return Call(problem, tile_size(problem))

    def forward(self, call: "Call", arrays: Arrays, *, keep: bool) -> tuple[Outputs, Any]:
        sums = _sums(arrays, call=call)
        loss, stats = sums.finish(call.problem, arrays.labels)
        return (loss, stats), Kept(arrays, sums.maximum, sums.exp, sums.target) if keep else None

    def backward(
        self,
        call: "Call",
        kept: "Kept",
        wanted: Wanted,
        g: Float[Array, " N"],
        mark: Float[Array, ""],
    ) -> Arrays:
        return _gradients(kept, g, mark, call=call, wanted=wanted)


BACKEND = Chunked()


class Tile(NamedTuple):
    """The largest tile: n tokens × v classes."""

    n: int
    v: int


class Call(NamedTuple):
    """What is static in a call."""

    problem: Problem
    tile: Tile


class Kept(NamedTuple):
    """What the backward pass needs."""

    arrays: Arrays
    maximum: Float[Array, " N"]
    """m = max_v z_v."""
    total: Float[Array, " N"]
    """Σ_v exp(z_v − m)."""
    target: Float[Array, " N"]
    """z_y."""


def tile_size(problem: Problem) -> Tile:
    """All tokens × as many classes as the budget allows, or fewer tokens where those are too few.

    A strip of all tokens feeds the matmuls best, and reads the head once. The steps come out about
    equal, so that the last one is not a sliver.
    """
    budget = {"cpu": 2**21, "gpu": 2**25}.get(problem.platform, 2**24)
    v = _even_step(problem.v, at_most=max(512, budget // max(problem.n, 1)), multiple=128)
    n = _even_step(problem.n, at_most=max(128, budget // v), multiple=8)
    return Tile(n, v)


def _even_step(size: int, at_most: int, multiple: int) -> int:
    """The step that covers `size` in the fewest, nearly equal steps."""
    steps = max(1, cdiv(size, at_most))
    step = cdiv(size, steps)
    return min(size, cdiv(step, multiple) * multiple) if steps > 1 else size


# Both passes are primitives: under `vmap` the examples come one after the other, since a tile of
# one is as large as memory should be, and no policy of `jax.checkpoint` sees matrix products inside
# whose results, all of the logits, it would save.


@functools.partial(primitive, "chunked_sums")
def _sums(arrays: Arrays, *, call: Call) -> LogitSums:
    """The sums over all classes of every token."""
    problem, tile = call
    hidden, head, labels, bias, _ = arrays

    def tokens(start, count, sums):
        e, y = _part(hidden, start, count), _part(labels, start, count)

        def classes(first, width, block):
            z = _logits(problem, e, *_strip(problem, head, bias, first, width))
            return block.combine(LogitSums.of(z, y, first))

        block = _loop(problem.v, tile.v, classes, LogitSums.empty(count))
        return jax.tree.map(lambda whole, part: _put(whole, start, part), sums, block)

    return _loop(problem.n, tile.n, tokens, LogitSums.empty(problem.n))


@functools.partial(primitive, "chunked_gradients")
def _gradients(
    kept: Kept, g: Float[Array, " N"], mark: Float[Array, ""], *, call: Call, wanted: Wanted
) -> Arrays:
    """The gradients of Σ_n g_n·L_n; those of head and bias start at the mark, which is 0 or NaN.

    With u the logits before the cap and slope = dz/du:
        du = g·((1 + 2λ·lse)·p − (1−β)·onehot(y) − β/V)·slope
        p  = exp(z − maximum) / total       (exp(z − lse) would have the rounding of a large lse)
        dE = scale·du·C,  dC = scale·duᵀ·E,  db = Σ_n du
    Without a cap the smoothing part of du is the same in every column, so it is left out of the
    tiles and of their rounding, and comes in as vectors: −(β/V)·g_n·Σ_v C_v in dE,
    −(β/V)·Σ_n g_n·E_n in dC, −(β/V)·Σ_n g_n in db. What rounding cuts off the targets' du is given
    back to dE (`lsce.rounding`).
    """
    problem, tile = call
    (hidden, head, labels, bias, _), maximum, total, z_target = kept
    layout = problem.head_layout
    # A token without a say may hold NaN in its hidden row and its lse, and 0 · NaN is not 0. Where
    # there is none, 0 · p stays as it is: its derivative in g is not 0.
    finite = jnp.isfinite(maximum) & jnp.isfinite(total)
    active = (g != 0.0) | ((labels >= 0) & finite)
    hidden = jnp.where(active[:, None], hidden, jnp.zeros_like(hidden))
    maximum, total = jnp.where(active, maximum, jnp.inf), jnp.where(active, total, 1.0)
    lse = jnp.where(active, maximum, 0.0) + jnp.log(total)
    softmax = jnp.where(active, g * formula.softmax_weight(problem, lse) / total, 0.0)
    target = (1.0 - problem.label_smoothing) * g
    smoothing = (problem.label_smoothing / problem.v) * g
    vectors = problem.label_smoothing > 0.0 and problem.softcap is None
    hidden_sum = jnp.zeros(problem.d, jnp.float32)
    if vectors:
        rows = hidden.astype(jnp.float32)
        hidden_sum = jnp.einsum("n,nd->d", smoothing, rows, precision=lax.Precision.HIGHEST)

    def classes(first, width, carry):
        d_hidden, head_sum, d_head, d_bias = carry
        c, b = _strip(problem, head, bias, first, width)

        def tokens(start, count, carry):
            d_hidden, d_strip, d_bias_strip = carry
            e, y, p_weight, y_weight, smooth, top = (
                _part(x, start, count)
                for x in (hidden, labels, softmax, target, smoothing, maximum)
            )
            z = _logits(problem, e, c, b)
            du = p_weight[:, None] * jnp.exp(z - top[:, None])
            at_target = (y - first)[:, None] == jnp.arange(width, dtype=jnp.int32)[None, :]
            du = du - jnp.where(at_target, y_weight[:, None], 0.0)
            if problem.softcap is not None:
                du = (du - smooth[:, None]) * formula.softcap_slope(problem, z)
            if wanted.hidden:
                part = _product(problem, f"nv,{layout}->nd", du, c)
                d_hidden = _put(d_hidden, start, _part(d_hidden, start, count) + part)
            if wanted.head:
                d_strip += _product(problem, f"nv,nd->{layout}", du, e)
            if wanted.bias:
                d_bias_strip += jnp.sum(du, axis=0)
            return d_hidden, d_strip, d_bias_strip

        start = jnp.full_like(c, mark, jnp.float32), jnp.full(width, mark)
        d_hidden, d_strip, d_bias_strip = _loop(problem.n, tile.n, tokens, (d_hidden, *start))
        if vectors:
            head_sum += jnp.einsum(f"{layout}->d", c.astype(jnp.float32))
            d_strip -= jnp.expand_dims(hidden_sum, layout.index("v"))
            d_bias_strip -= jnp.sum(smoothing)
        if wanted.head:
            d_head = _put(d_head, first, problem.logit_scale * d_strip, layout.index("v"))
        if wanted.bias:
            d_bias = _put(d_bias, first, d_bias_strip)
        return d_hidden, head_sum, d_head, d_bias

    carry = (
        jnp.zeros((problem.n, problem.d), jnp.float32) if wanted.hidden else None,
        jnp.zeros(problem.d, jnp.float32),
        jnp.zeros_like(head) if wanted.head else None,
        jnp.zeros_like(bias) if bias is not None and wanted.bias else None,
    )
    d_hidden, head_sum, d_head, d_bias = _loop(problem.v, tile.v, classes, carry)
    if d_hidden is not None:
        if vectors:
            d_hidden -= smoothing[:, None] * head_sum[None, :]
        if (dtype := _operand_dtype(problem, np.dtype(np.float32))) != np.float32:
            du = softmax * jnp.exp(z_target - maximum) - target
            if problem.softcap is not None:
                du = (du - smoothing) * formula.softcap_slope(problem, z_target)
            lost = rounding.lost(du, dtype)
            lost = jnp.where((labels >= 0) & (labels < problem.v), lost, 0.0)
            d_hidden += rounding.given_back(lost, head, labels, layout.index("v"))
        d_hidden = (problem.logit_scale * d_hidden).astype(hidden.dtype)
    return Arrays(d_hidden, d_head, None, d_bias)


def _logits(
    problem: Problem, e: Float[Array, "n D"], c: Array, b: Float[Array, " w"] | None
) -> Float[Array, "n w"]:
    product = _product(problem, f"nd,{problem.head_layout}->nv", e, c)
    return formula.logits(problem, product, b)


def _operand_dtype(problem: Problem, left: np.dtype) -> np.dtype:
    """That of a product's operands, the left one's being that, which loses nothing of the inputs.

    Two bfloat16 inputs are multiplied as they are, and dz, rounded to bfloat16, with them. Two
    float16 inputs likewise, but float16 has too little range for dz. The rest is float32.
    """
    dtypes = {problem.hidden_dtype, problem.head_dtype}
    native = dtypes == {np.dtype(jnp.bfloat16)} or dtypes | {left} == {np.dtype(np.float16)}
    return problem.head_dtype if native else np.dtype(np.float32)


def _product(problem: Problem, subscripts: str, a: Array, b: Array) -> Array:
    """A matmul summed in float32, of operands as `_operand_dtype` has them."""
    dtype = _operand_dtype(problem, np.dtype(a.dtype))
    # Without a word from the user JAX multiplies float32 on a GPU with 10 bits of mantissa.
    chosen = jax.config.jax_default_matmul_precision
    precision = lax.Precision.HIGHEST if chosen is None and dtype == np.float32 else None
    return jnp.einsum(
        subscripts,
        a.astype(dtype),
        b.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _loop(size: int, step: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """carry = body(start, count, carry) over [0, size) in steps, the last one as short as it is."""
    whole, rest = divmod(size, step) if size else (0, 0)
    if whole == 1:
        carry = body(0, step, carry)
    elif whole:
        carry = lax.fori_loop(
            0, whole, lambda i, carry: body(jnp.int32(i * step), step, carry), carry
        )
    return body(whole * step, rest, carry) if rest else carry


def _strip(
    problem: Problem, head: Array, bias: Array | None, first: Any, width: int
) -> tuple[Array, Array | None]:
    """The classes [first, first + width) of the head and of the bias."""
    axis = problem.head_layout.index("v")
    return _part(head, first, width, axis), None if bias is None else _part(bias, first, width)


def _part(x: Array, start: Any, count: int, axis: int = 0) -> Array:
    return lax.dynamic_slice_in_dim(x, start, count, axis)


def _put(x: Array, start: Any, part: Array, axis: int = 0) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)
