"""The door: has a call checked, hands its tokens to a backend, reduces what comes back."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Integer

from lsce import backends, sharding
from lsce.arguments import array, integer
from lsce.problem import (
    INT32,
    SMALLEST_WEIGHT,
    GradientFilter,
    HeadLayout,
    Precision,
    Reduction,
    of_call,
    require_float32,
    require_integers,
    require_permutation,
)

ARRAYS = "hidden", "head", "labels", "bias", "weights", "vocab_order"


def linear_cross_entropy(
    hidden: Float[Array, "*tokens D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*tokens"],
    *,
    label_smoothing: float = 0.0,
    weights: Float[Array, "*tokens"] | Bool[Array, "*tokens"] | None = None,
    ignore_index: int = -100,
    bias: Float[Array, " V"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    head_layout: HeadLayout = "vd",
    gradient_filter: GradientFilter = "auto",
    precision: Precision | None = None,
    vocab_order: Int[Array, " V"] | None = None,
    return_stats: bool = False,
    implementation: str = "auto",
) -> Any:
    """Label-smoothed cross-entropy of a linear head, without its N×V logits.

        z_nv = softcap(scale · E_n·C_v + bias_v)
        L_n  = lse_n − (1−β)·z_{n,y_n} − (β/V)·Σ_v z_nv + λ·lse_n²

    in nats, where lse_n = log Σ_v exp z_nv. The smoothing mass β is spread over all V classes, the
    target included (as in PyTorch and `optax.smooth_labels`; others spread it over V − 1).

    Args:
      hidden: E, the last hidden states, any float dtype; the leading axes are N tokens in all.
      head: C, the head's weights, any float dtype. bfloat16 and float16 pairs are multiplied as
        they are and summed in float32; any other pair is multiplied in full float32, unless
        `jax_default_matmul_precision` says otherwise.
      labels: y, the class of each token, any integer dtype.
      label_smoothing: β in [0, 1].
      weights: w, one weight a token; 0 (or False) removes the token. Differentiable. Float32 has
        to hold them: one that is not 0 and below 1.2e-38 makes the loss NaN, or where it is known
        on the host an error.
      ignore_index: the label of tokens without a loss.
      bias: added to the logits. −∞ takes a class away, and makes the loss infinite with smoothing;
        a softcap makes −cap of it instead.
      logit_scale: multiplies E·C; 1 / temperature.
      softcap: Gemma 2's cap: z = cap · tanh(z / cap).
      z_loss: λ.
      reduction: "mean" = Σ w·L / Σ w over the tokens not ignored (0 where Σ w = 0), "sum" = Σ w·L,
        "none" = w·L of each token.
      head_layout: "vd" for a head [V, D], "dv" for [D, V]. On Hopper "dv" copies the head, as do a
        V that is no multiple of 8 and a D that is none of 64; `lsce.explain` says how much.
      gradient_filter: permission to drop small probabilities from the gradient, never from the
        loss. None is exact; a float ε drops those below ε. "fused" lets a backend make exact
        gradients in the forward pass: on Hopper with a bias, statistics, smoothing under a softcap,
        or where V is no multiple of 256 and P, bfloat16 logits in its place, is too large to be
        kept whole, they are made afterwards all the same, as `lsce.explain` says. The derivative of
        a scan keeps those of each step, unless `jax.checkpoint` is around it. "auto" leaves it to
        the backend; on Hopper its errors are, on models' activations, next to those of exact
        gradients. "hidden" drops from hidden's gradient alone, there at a larger ε. With Adam what
        is dropped still shows a little in what is learnt, the more so with smoothing, a large
        vocabulary and a larger ε, which is faster (README, Exactness); under a softcap neither of
        the two drops anything: they compute in 8 bits what "fp8" does. "fp8" drops nothing: what
        lies below ε is computed from 8-bit operands instead (on Hopper; "auto" takes it there in
        large calls whose tokens are flat, without a bias, of more than 65,536 classes or where it
        fits in the memory of a filter). The gradients of a sum or a mean, head's among them, it
        makes as "fused" does, in less memory, where 8 bits pay less: of up to D tokens, of bfloat16
        logits of up to 1.1 GB, and of up to 65,536 classes in multiples of 256, for as many tokens
        at a time as a quarter of naive optax's memory has room for, or for 2D. A scan keeps them
        for each step then, too.
      precision: permission to compute the loss from 8-bit operands where a logit says little:
        "fp8" (on Hopper, without a softcap and statistics, in large calls of more than 65,536
        classes; never taken unasked). What has more than 2^-7 of any token's probability is
        computed in 16 bits beside it. A token's loss is then off by 0.002 to 0.005 nats (root mean
        square, on an H200 and simulated on two real models; with logits rounded to bfloat16, as
        without this library, by 0.025), the mean loss by up to 0.0025. It needs the head's size in
        8 bits while the loss is computed.
      vocab_order: a permutation of the classes by how active they are (`lsce.vocabulary_order`);
        a hint that may change a backend's speed, and no exact result. Which probabilities below
        the gradient filter are dropped may depend on it.
      return_stats: also return a `TokenStats`, from the same pass.
      implementation: "auto" or a backend's name; `lsce.explain` says which and why.

    Returns:
      The loss, float32: a scalar, or [*tokens] for reduction="none". With `return_stats` a pair
      (loss, TokenStats). Gradients come in the dtypes of the inputs, summed in float32.
      A label outside [0, V) that is not `ignore_index` makes its token's loss NaN, and with it the
      gradients; `lsce.check_labels` looks for such labels on the host.
      Forward-mode differentiation needs implementation="reference"; others raise TypeError. Second
      derivatives need "chunked" or "reference".

    On a mesh of devices, outside `shard_map`, the call is that over all tokens; each device
    computes a part of them, with the whole head. The mesh is that of the arrays (`jax.device_put`,
    `with_sharding_constraint`) or, under `jit`, of `jax.set_mesh`. A mesh that only stands in
    `jit(…, in_shardings=…)` or in `with mesh:` is not seen from here: every device then computes
    all tokens, as `lsce.explain` says where it is called in the same place. Inside `shard_map` the
    call is the device's own: a "mean" is over its tokens.

    Raises:
      TypeError: an array or option of the wrong type, such as float labels or a traced option.
      ValueError: shapes that do not fit, an option out of range, options that contradict, or a
        named implementation that cannot take the call. All before anything is compiled.

    Source: Eq. 5 and 15 of the label smoothing paper; Wijmans et al., "Cut Your Losses in
    Large-Vocabulary Language Models", 2024; Gemma 2 for the cap; PaLM for the z-loss.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> print(f"{linear_cross_entropy(hidden, head, jnp.array([0]), label_smoothing=0.1):.4f}")
    0.3633
    """
    hidden, head = array("hidden", hidden), array("head", head)
    require_float32(weights)
    y: Any = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    bias, weights, order = (
        None if x is None else array(name, x)
        for name, x in (("bias", bias), ("weights", weights), ("vocab_order", vocab_order))
    )
    problem = of_call(
        hidden,
        head,
        y,
        weights=weights,
        bias=bias,
        vocab_order=order,
        ignore_index=ignore_index,
        reduction=reduction,
        head_layout=head_layout,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
        gradient_filter=gradient_filter,
        precision=precision,
        return_stats=return_stats,
        device=_device(hidden),
    )
    require_permutation(vocab_order)
    mesh = sharding.mesh_of((hidden, head, y, bias, weights, order))
    backend = backends.choose(sharding.of_one_device(problem, mesh), implementation)

    labels = _saturate(y)
    hidden = sharding.flat(hidden, problem.n, problem.d)
    y = sharding.flat(labels, problem.n)
    live = y != ignore_index
    valid = (y >= 0) & (y < problem.v)
    w = jnp.ones(problem.n, jnp.float32)
    if weights is not None:
        w = sharding.flat(_as_float32(weights), problem.n)
        # A removed token must not bring in a NaN of its hidden state or its logits as 0 · NaN.
        live &= (w != 0.0) | _moderate(hidden)
    invalid = live & ~valid & (w != 0.0)
    # From here on an invalid label is a weight of NaN, which marks the loss and the gradients.
    w = jnp.where(live, jnp.where(invalid, jnp.nan, w), 0.0)
    y = jnp.where(live & valid, y, -1)
    if reduction == "mean":
        w = _normalised(w if weights is None else _scaled(w))

    arrays = backends.Arrays(hidden, head, y, bias, order)
    summed = reduction != "none"
    total, stats = sharding.weighted(backend, problem, arrays, w, summed=summed)
    if not summed:
        total = sharding.shaped(total, labels)
    if stats is None:
        return total
    stats = stats._replace(loss=jnp.where(invalid, jnp.nan, stats.loss))
    stats = jax.lax.stop_gradient(stats)
    return total, jax.tree.map(lambda x: sharding.shaped(x, labels), stats)


def _normalised(weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """w / Σ w, and 0 where Σ w = 0."""
    count = jnp.sum(weights)
    return jnp.where(count == 0.0, 0.0, weights / jnp.where(count == 0.0, 1.0, count))


def _scaled(weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """w relative to the largest, so that Σ w neither overflows nor vanishes."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights), initial=0.0))
    # Halfway first: the inverse of the greatest numbers is flushed to 0.
    halfway = jnp.where(largest > 1.0, 2.0**-64, 2.0**64)
    return weights * halfway / jnp.where(largest == 0.0, 1.0, largest * halfway)


def _as_float32(weights: Array) -> Float[Array, "*tokens"]:
    """Weights in float32, NaN for those that are not 0 and would be flushed to it there."""
    w = weights.astype(jnp.float32)
    if weights.dtype == jnp.bool_:
        return w
    # By their bits: a processor that flushes says that they equal 0.
    unsigned = jnp.dtype(f"uint{8 * weights.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(weights), unsigned)
    flushed = (bits << jnp.ones((), unsigned) != 0) & (jnp.abs(w) < SMALLEST_WEIGHT)
    return jnp.where(flushed, jnp.nan, w)


def _moderate(hidden: Float[Array, "N D"]) -> Bool[Array, " N"]:
    """The rows whose products with a head of the same kind of numbers cannot overflow."""
    return jnp.all(jnp.abs(hidden.astype(jnp.float32)) <= 2.0**56, axis=1)


def explain(hidden: Any, head: Any, labels: Any, **options: Any) -> backends.Explanation:
    """Which backend `linear_cross_entropy` would take for this call, and why not the others.

    Takes the same arguments, arrays or `jax.ShapeDtypeStruct`s; computes nothing. Print the result.
    Raises what the call itself would raise.
    """
    call = inspect.signature(linear_cross_entropy).bind(hidden, head, labels, **options)
    call.apply_defaults()
    given = call.arguments
    order = given["vocab_order"]
    require_float32(given["weights"])
    for name in ARRAYS:
        left_out = given[name] is None and name in ("bias", "weights", "vocab_order")
        if not left_out and not hasattr(given[name], "dtype"):
            given[name] = array(name, given[name])  # a list, or a mistake
    options = dict(call.kwargs)
    implementation = options.pop("implementation")
    problem = of_call(*call.args, **options, device=_device(given["hidden"]))
    require_permutation(order)
    mesh = sharding.mesh_of([given[name] for name in ARRAYS if given[name] is not None])
    share = sharding.of_one_device(problem, mesh)
    explanation = backends.explain(share, implementation)
    if mesh is not None and mesh.size > 1:
        where = f"{share.n:,} of {problem.n:,} tokens on each of {mesh.size} devices"
    elif jax.device_count() > 1:
        where = "all tokens on each device: no array carries a mesh, and jax.set_mesh gives none"
    else:
        return explanation
    return explanation.adding(where)


def check_labels(labels: Any, vocab_size: int, *, ignore_index: int = -100) -> None:
    """Raises ValueError if a label is neither in [0, vocab_size) nor `ignore_index`.

    Looks at the values on the host, so it takes concrete arrays only: under `jit` the loss itself
    turns NaN at such a label. TypeError for labels that are not integers or are traced.
    """
    vocab_size, ignore_index = (
        integer(name, x) for name, x in (("vocab_size", vocab_size), ("ignore_index", ignore_index))
    )
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size}; must be at least 1")
    if isinstance(labels, Tracer):
        raise TypeError(
            "check_labels reads values, and these labels are traced: call it outside jit"
        )
    labels = np.asarray(labels)
    require_integers(labels)
    wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{wrong.sum()} of {labels.size} labels lie outside [0, {vocab_size}) and are not "
            f"ignore_index={ignore_index}; the first is {labels[place]} at {list(place)}"
        )


def _saturate(labels: Any) -> Array:
    """Labels as int32, those beyond its range at its ends: a wrapped label could look valid."""
    xp = np if isinstance(labels, np.ndarray) else jnp
    info = jnp.iinfo(labels.dtype)
    labels = xp.clip(labels, max(info.min, INT32.min), min(info.max, INT32.max))
    return jnp.asarray(labels.astype(np.int32))


def _device(array: Any) -> Any:
    """Where the call will run: with its array if it is concrete, else JAX's default."""
    if isinstance(array, jax.Array) and not isinstance(array, Tracer):
        return next(iter(array.devices()))
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]
