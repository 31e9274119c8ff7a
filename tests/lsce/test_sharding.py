"""The loss on arrays of a mesh, against the same call on one device.

Hopper's kernels are lowered only: their interpreter knows one device.
"""

import on_devices
import pytest

START = """
    import itertools
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import lsce

    assert jax.device_count() == 4
    B, T, D, V = 4, 6, 32, 300
    r = np.random.default_rng(0)
    arrays = {
        "hidden": r.normal(size=(B, T, D)).astype(np.float32),
        "head": r.normal(size=(V, D)).astype(np.float32),
        "bias": r.normal(size=V).astype(np.float32),
        "weights": r.random((B, T)).astype(np.float32),
    }
    labels = r.integers(0, V, (B, T)).astype(np.int32)
    labels[0, :5] = -100  # so that devices differ in how many tokens have a loss
    cotangent = np.arange(1.0, B * T + 1, dtype=np.float32).reshape(B, T)

    def loss(a, labels, **options):
        out, stats = lsce.linear_cross_entropy(
            a["hidden"], a["head"], labels, bias=a["bias"], weights=a["weights"],
            label_smoothing=0.1, z_loss=1e-3, return_stats=True, **options,
        )
        return (out * cotangent).sum() if out.ndim else out, (out, stats)

    def step(**options):
        return jax.value_and_grad(lambda a, y: loss(a, y, **options), has_aux=True)

    def check(got, truth):
        close = lambda x, y: np.testing.assert_allclose(
            np.asarray(x), np.asarray(y), rtol=2e-4, atol=2e-5
        )
        jax.tree.map(close, got, truth)
        assert sum(x.size for x in jax.tree.leaves(truth)) > V * D

    def put(mesh, hidden, head):
        specs = {"hidden": hidden, "head": head, "bias": P(), "weights": P(*hidden[:2])}
        on = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        return jax.tree.map(on, arrays, specs), on(labels, P(*hidden[:2]))
"""

ON_A_MESH = """
    def mesh_of(shape, names, kinds):
        devices = jax.devices()[: int(np.prod(shape))]
        return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)

    meshes = [
        ((4,), ("data",), P("data"), P()),
        ((2, 2), ("data", "model"), P("data"), P("model")),
        ((2, 2), ("data", "model"), P("data", None, "model"), P(None, "model")),
        ((2, 2), ("data", "model"), P(None, "data"), P()),  # parts of sequences
        ((1,), ("data",), P("data"), P("data")),  # a script for several devices on one
        ((1, 1), ("data", "model"), P(None, "data"), P(None, "model")),
    ]
    for implementation, reduction in (
        ("chunked", "mean"), ("chunked", "sum"), ("chunked", "none"), ("reference", "mean")
    ):
        run = step(implementation=implementation, reduction=reduction)
        truth = jax.jit(run)(arrays, labels)
        usual = (implementation, reduction) == ("chunked", "mean")
        for (shape, names, hidden, head), kind in itertools.product(
            meshes if usual else meshes[1:2], (AxisType.Auto, AxisType.Explicit)
        ):
            mesh = mesh_of(shape, names, (kind,) * len(names))
            given = put(mesh, hidden, head)
            check(jax.jit(run)(*given), truth)
            if usual and shape == (2, 2):
                with jax.set_mesh(mesh):
                    check(jax.jit(run)(*given), truth)
            if kind == AxisType.Auto and usual:
                check(run(*given), truth)  # without jit

    # What is one entry a token lies as the labels do, where the sharding is part of the type.
    mesh = mesh_of((2, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    each, stats = jax.jit(lambda a, y: loss(a, y, reduction="none")[1])(
        *put(mesh, P(None, "data"), P())
    )
    assert {jax.typeof(x).sharding.spec for x in (each, *stats)} == {P(None, "data")}

    # Axes of both kinds.
    run = step(implementation="chunked")
    for kinds in itertools.permutations((AxisType.Explicit, AxisType.Auto)):
        mesh = mesh_of((2, 2), ("data", "model"), kinds)
        check(jax.jit(run)(*put(mesh, P("data"), P("model"))), jax.jit(run)(arrays, labels))

    # Nothing is gathered where the tokens lie on the devices as they should.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    text = jax.jit(step()).lower(*put(mesh, P("data"), P())).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text

    # Tokens that only one axis divides, tokens that none does, and none at all.
    run, all_cotangents = step(implementation="chunked"), cotangent
    for rows, kind in itertools.product((2, 1, 0), (AxisType.Auto, AxisType.Explicit)):
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
        part = {k: x[:rows, :3] if k in ("hidden", "weights") else x for k, x in arrays.items()}
        cotangent = all_cotangents[:rows, :3]
        given = part, labels[B - rows :, :3]
        check(jax.jit(run)(*jax.device_put(given, NamedSharding(mesh, P()))), jax.jit(run)(*given))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    cotangent = all_cotangents

    # No device computes more than its share, be N no multiple of their number.
    def flops(tokens, put):
        shapes = ((tokens, D), np.float32), ((V, D), np.float32), ((tokens,), np.int32)
        given = [put(*x) for x in shapes]
        step = jax.jit(jax.grad(lsce.linear_cross_entropy, argnums=(0, 1)))
        return step.lower(*given).compile().cost_analysis()["flops"]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    struct = jax.ShapeDtypeStruct
    on_mesh = lambda *x: struct(*x, sharding=NamedSharding(mesh, P()))
    one, even, uneven = flops(1024, struct), flops(1024, on_mesh), flops(1022, on_mesh)
    assert even < 0.3 * one
    assert uneven < 0.3 * one
    # Under `jax.set_mesh` without a word about the arrays; explain says which is which.
    with jax.set_mesh(mesh):
        assert flops(1024, struct) < 0.3 * one
    says = lambda put, n: lsce.explain(
        put((n, D), np.float32), put((V, D), np.float32), put((n,), np.int32)
    ).reasons["chunked"]
    assert says(on_mesh, 1022).endswith("256 of 1,022 tokens on each of 4 devices")
    assert "no array carries a mesh" in says(struct, 1022)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    # Sums of weighted losses, which a backend might make in its forward pass.
    from lsce import loss as one_device, sharding
    from lsce.backends import Arrays, reference
    from lsce.problem import Problem

    def summed(weighted, x):
        hidden, y, w = x["hidden"].reshape(-1, D), x["labels"].reshape(-1), x["weights"].reshape(-1)
        f32 = np.dtype(np.float32)
        problem = Problem(len(y), D, V, f32, f32, platform="cpu", chip="cpu", has_bias=True)
        given = Arrays(hidden, x["head"], y, x["bias"])
        return weighted(reference.BACKEND, problem, given, w, summed=True)[0]

    for rows in (4, 1):  # on all four devices, with or without tokens to fill up
        whole = arrays | {"labels": np.maximum(labels, 0)}
        by_token = ("hidden", "weights", "labels")
        part = slice(rows), slice(6 if rows > 1 else 3)
        whole = {k: x[part] if k in by_token else x for k, x in whole.items()}
        on_all = jax.device_put(whole, NamedSharding(mesh, P()))
        run = lambda weighted: jax.jit(
            jax.value_and_grad(lambda x: summed(weighted, x), allow_int=True)
        )
        got, truth = run(sharding.weighted)(on_all), run(one_device.weighted)(whole)
        got[1].pop("labels"), truth[1].pop("labels")
        check(got, truth)

    # Under a scan over batches, and rematerialised.
    def scanned(a, y):
        def one(total, i):
            part = a | {"hidden": a["hidden"] * i}
            return total + jax.checkpoint(lambda a: loss(a, y)[0])(part), None

        return jax.lax.scan(one, jnp.float32(0), jnp.arange(1.0, 4.0))[0]

    run = jax.value_and_grad(scanned)
    check(jax.jit(run)(*put(mesh, P("data"), P("model"))), jax.jit(run)(arrays, labels))
    print("all the same")
"""

README = """
    import pathlib, re

    readme = pathlib.Path("README.md").read_text()
    blocks = re.findall(r"```python\\n(.*?)```", readme, re.DOTALL)
    example, on_a_mesh = (block for block in blocks if "train_step(" in block)
    names = {}
    exec(example, names)
    first = names["loss"]
    exec(on_a_mesh, names)
    assert names["loss"] < first
    assert names["tokens"].sharding.spec == P("data")
    print("all the same")
"""

IN_SHARD_MAP = """
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for implementation in ("chunked", "reference"):
        options = dict(implementation=implementation, reduction="sum")
        truth = jax.jit(jax.value_and_grad(lambda a: loss(a, labels, **options)[0]))(arrays)
        for axes, check_vma in itertools.product(
            (("data",), ("data", "model")), (True, False)
        ):
            def local(a, y):
                total, (_, stats) = loss(a, y, **options)
                return jax.lax.psum(total, axes), stats

            split = P("data", None) if axes == ("data",) else P("data", "model")
            given = {"hidden": split, "head": P(), "bias": P(), "weights": split}
            mapped = jax.shard_map(
                local, mesh=mesh, in_specs=(given, split), out_specs=(P(), split),
                check_vma=check_vma,
            )
            run = jax.value_and_grad(lambda a: mapped(a, labels)[0])
            check(jax.jit(run)(arrays), truth)
    print("all the same")
"""

LOWERED = """
    from jax._src import core
    from lsce import sharding
    from lsce.backends import Arrays, hopper
    from lsce.problem import Problem

    bf16 = np.dtype(jnp.bfloat16)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = P("data"), P(), P("data"), P("data")
    shapes = (8192, 256), (51200, 256), (8192,), (8192,)
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.float32
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs)
    ]

    def total(hidden, head, labels, weights):
        problem = Problem(
            *hidden.shape, head.shape[0], bf16, bf16, platform="gpu",
            chip="NVIDIA H100 80GB HBM3", label_smoothing=0.1, gradient_filter=gradient_filter,
        )
        given = Arrays(hidden, head, labels)
        return sharding.weighted(hopper.BACKEND, problem, given, weights, summed=True)[0]

    # Where an empty array enters or leaves a `shard_map`, XLA's partitioner crashes the process.
    def crossing(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "shard_map":
                yield from (x.aval.shape for x in (*equation.invars, *equation.outvars))
            for inner in core.jaxprs_in_params(equation.params):
                yield from crossing(inner)

    local = lambda *arrays: jax.lax.psum(total(*arrays), "data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    for gradient_filter in (None, "auto", "fused", "fp8"):
        for function in (total, lambda *arrays: mapped(*arrays)):
            for argnums in ((0, 1), 0, 1):
                traced = jax.jit(jax.grad(function, argnums=argnums)).trace(*given)
                shapes = list(crossing(traced.jaxpr.jaxpr))
                assert len(shapes) > 4
                assert not any(0 in shape for shape in shapes), shapes
            gradient = jax.jit(jax.grad(function, argnums=(0, 1)))
            text = gradient.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("mosaic_gpu") >= 4
            # Every device has its own 2,048 tokens, and dC is summed over all, once.
            assert "tensor<2048x256xbf16>" in text
            summed = [part[:1500] for part in text.split("stablehlo.all_reduce")[1:]]
            assert sum("tensor<51200x256xbf16>" in part for part in summed) == 1
            assert len(summed) <= 2  # the other one is the loss
    print("all the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [ON_A_MESH, IN_SHARD_MAP, LOWERED, README],
    ids=["mesh", "shard_map", "hopper, lowered", "README"],
)
def test_on_four_devices(script):
    assert on_devices.run(4, START, script) == "all the same"
