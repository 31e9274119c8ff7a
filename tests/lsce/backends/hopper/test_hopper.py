"""The Hopper backend as a whole: what it refuses, and that all of it lowers for CUDA without a GPU.

On a Hopper GPU the whole contract of the loss runs against this backend (contract.py adds it). The
modules beside this one run each mode in Mosaic GPU's interpreter, on a CPU and at a small ragged
shape: it takes seconds for a chip's microseconds.
"""

import dataclasses
import itertools
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_no_worse, case, ours
from hopper_on_cpu import CANDIDATE, H100, problem, sixty_four_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.sharding import AbstractMesh, AxisType

import lsce
from lsce import api, backends
from lsce.backends import Arrays, hopper
from lsce.backends.hopper import choose
from lsce.backends.hopper.call import Call
from lsce.loss import weighted

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_refusals_name_what_is_missing():
    refuses = hopper.BACKEND.refuses
    assert refuses(problem()) is None
    assert "cpu" in refuses(problem(platform="cpu"))
    assert "A100" in refuses(problem(chip="NVIDIA A100-SXM4-80GB"))
    assert "float32" in refuses(problem(head_dtype=np.dtype(np.float32)))
    assert "GH100X" in refuses(problem(chip="NVIDIA GH100X"))
    assert refuses(problem(softcap=1000.0)) is None
    assert "softcap, too little for 1e+06" in refuses(problem(softcap=1e6))
    assert refuses(problem(n=65_536, v=300_000)) is None
    assert "not 1,048,576 × 262,144" in refuses(problem(n=2**20, v=2**18))


def test_logits_are_counted_by_the_device(monkeypatch):
    """The limit itself is 2^37 of them on one."""
    monkeypatch.setattr(api, "_device", lambda _: SimpleNamespace(platform="gpu", device_kind=H100))
    mesh = AbstractMesh((64,), ("data",), axis_types=(AxisType.Auto,))

    def chosen(n: int, v: int) -> str:
        shapes = ((n, 64), jnp.bfloat16), ((v, 64), jnp.bfloat16), ((n,), jnp.int32)
        return lsce.explain(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).implementation

    assert chosen(4_194_304, 128_256) == "chunked"
    with jax.sharding.use_abstract_mesh(mesh):
        assert chosen(4_194_304, 128_256) == "hopper"
        assert chosen(64 * (2**20 - 1), 2**17) == "hopper"
        assert chosen(64 * (2**20 - 1) + 1, 2**17) == "chunked"


@pytest.mark.slow
@given(n=st.integers(1, 2**22), d=st.integers(1, 1024), v=st.integers(2, 2**21), most=st.booleans())
def test_what_is_not_refused_is_counted_in_32_bits(n, d, v, most):
    """The largest number in `plan.work`, where every pair is active."""
    if most:
        n = min((2**37 - 1) // v, 2**22)
    p = problem(n=n, d=8 * d, v=v)
    assume(hopper.BACKEND.refuses(p) is None)
    sparse = choose.tiles_for(p).sparse
    blocks, column_tiles = -(-n // 256) * 2, -(-v // sparse.tile_c)
    slots = sparse.slots_for(blocks, column_tiles)
    a_chunk = sparse.width // sparse.tile_c - 1
    assert column_tiles * max(blocks * a_chunk, slots - blocks) < 2**31


def test_fused_says_why_not():
    def reason(**changes) -> str | None:
        changes = {"gradient_filter": "fused"} | changes
        return hopper.BACKEND.unfused(problem(**changes))

    assert reason() is None
    assert "bias" in reason(has_bias=True)
    assert "statistics" in reason(return_stats=True)
    assert "softcap" in reason(softcap=30.0, label_smoothing=0.1)
    assert reason(v=50_257) is None
    assert "V is no multiple of 256" in reason(v=50_257, n=65_536)
    said = backends.explain(problem(gradient_filter="fused", has_bias=True)).reasons
    assert said["hopper"] == (
        "chosen: the first able; gradients are made afterwards: there is a bias"
    )
    assert backends.explain(problem(gradient_filter="fused")).reasons["hopper"] == (
        "chosen: the first able"
    )
    on_a_cpu = problem(gradient_filter="fused", platform="cpu")
    assert backends.explain(on_a_cpu).reasons["chunked"].endswith("chunked has no other way")


@pytest.mark.slow
@settings(max_examples=40)
@given(n=st.integers(1, 65_536), d=st.integers(1, 1024), v=st.integers(1, 1200))
def test_no_hidden_size_keeps_gradients_from_being_fused(n, d, v):
    p = problem(n=n, d=8 * d, v=256 * v, gradient_filter="fused", label_smoothing=0.1)
    assert hopper.BACKEND.unfused(p) is None


OPTIONS = {
    "gemma2-2b": {"label_smoothing": 0.1},
    "all options": {
        "label_smoothing": 0.1,
        "softcap": 30.0,
        "z_loss": 1e-4,
        "return_stats": True,
    },
    "smollm2": {"d": 576, "v": 49152, "n": 2048},
    "llama3-8b": {"d": 4096, "v": 128256, "n": 32768},
    "qwen3-0.6b, ragged": {"d": 1024, "v": 151936, "softcap": 30.0},
}


KERNELS = {
    None: 4,
    "auto": 8,  # the forward a second time, and a filter's three that move rows
    "auto, or 8 bits": 13,  # terms of 8 bits, their products, and what adds to what there is
    "fp8": 11,
}
"""How many kernels are made, however often each is called: in two loops, or in both branches."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "epsilon"),
    [*itertools.product(OPTIONS, [None, "auto"]), ("all options", "fp8")],
)
def test_lowers_for_cuda_without_a_gpu_and_each_kernel_once(options, epsilon):
    p = problem(**OPTIONS[options])
    call = Call(p, epsilon, choose.tiles_for(p), ctas=132)

    def loss(hidden, head, labels):
        arrays, ones = Arrays(hidden, head, labels), jnp.ones(p.n, jnp.float32)
        return weighted(hopper.BACKEND, p, arrays, ones, summed=True, call=call)[0]

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(
        bf16(p.n, p.d), bf16(p.v, p.d), jax.ShapeDtypeStruct((p.n,), jnp.int32)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    made = set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text))
    most = KERNELS["auto, or 8 bits" if call.tail_where_flat else epsilon]
    if call.tail_where_flat and options == "llama3-8b":
        most += 1  # dE has another width in the 8 bits' tiles, so that its kernel is another
    # Up to jax 0.11 a kernel is numbered as it is lowered; later, two that are equal have one hash.
    assert len(made) == most if jax.__version_info__ < (0, 12) else 0 < len(made) <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient_filter", "bias"), [(None, True), (2.0**-12, True), ("fused", False)]
)
def test_64_bit_mode_changes_nothing(gradient_filter, bias):
    this = case((40, 64, 256), "bfloat16", label_smoothing=0.1, weights=True, bias=bias)
    options = this.options | {"gradient_filter": gradient_filter, "return_stats": False}
    assert this.naive.value.dtype == np.float32  # computed before
    with hopper.interpreted(), sixty_four_bits():
        got = ours(CANDIDATE, this.inputs, **options)
    assert got.value.dtype == np.float32
    np.testing.assert_allclose(got.value, this.truth.value, rtol=1e-5)
    assert_no_worse(got, this)


@pytest.mark.slow
def test_no_tokens():
    def loss(hidden, head):
        labels = jnp.zeros(0, jnp.int32)
        return lsce.linear_cross_entropy(
            hidden, head, labels, label_smoothing=0.1, implementation="hopper"
        )

    with hopper.interpreted():
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            jnp.zeros((0, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
        )
    assert value == 0
    assert grads[0].shape == (0, 64)
    np.testing.assert_array_equal(np.asarray(grads[1], np.float32), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("gradient_filter", "blocks"), [(None, 1), (2.0**-9, 1), (2.0**-9, 2)])
def test_no_races(gradient_filter, blocks):
    # With two stages a tile, so that the second consumer lags by one.
    given = case((130, 128, 260), "bfloat16", label_smoothing=0.1, spread=4.0).inputs
    small = hopper.small_tiles()
    small = dataclasses.replace(small, sparse=dataclasses.replace(small.sparse, blocks=blocks))

    def loss(hidden, head):
        return lsce.linear_cross_entropy(
            hidden, head, given.labels, label_smoothing=0.1, gradient_filter=gradient_filter
        )

    with hopper.interpreted(detect_races=True, tiles=small):
        grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(given.hidden, given.head)
        jax.block_until_ready(grads)
    assert np.isfinite(np.asarray(grads[0], np.float32)).all()
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.slow
def test_eager_gradients_are_compiled_once_and_know_nothing_of_removed_tokens(caplog):
    """The removed token's products overflow, and the others' gradients are what they were."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=(n, 64)), jnp.bfloat16) for n in (3, 256))
    labels, weights = jnp.array([7, 0, 255]), jnp.array([0.0, 1.0, 0.5])

    def gradients(hidden):
        def loss(hidden, head):
            return lsce.linear_cross_entropy(
                hidden,
                head,
                labels,
                weights=weights,
                label_smoothing=0.1,
                gradient_filter=None,
                implementation="hopper",
            )

        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            grads = jax.grad(loss, argnums=(0, 1))(hidden, head)
        compiled = sum("Finished XLA compilation" in line.message for line in caplog.records)
        return [np.asarray(grad, np.float32) for grad in grads], compiled

    with hopper.interpreted():
        _, first = gradients(hidden)
        expected, _ = gradients(hidden)  # the interpreter's first run changes JAX's configuration
        got, again = gradients(hidden.at[0].set(3e38))
    assert first > 0
    assert again == 0
    for grad, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(grad, other)
        assert np.abs(grad).max() > 0.01
