"""JAX on several devices."""

import on_devices
import pytest


@pytest.mark.slow
def test_devices_share_the_tokens():
    """The gradients are the same as of one device, and each needs a share of the memory."""
    printed = on_devices.run(
        2,
        """
        import dataclasses
        from benchmarks.frameworks.jax import JaxFramework, check_devices
        from benchmarks.implementations.settings import Run, Settings
        from benchmarks.inputs import cases, random
        from benchmarks.measure import errors, runner

        case = cases.Case("small", 512, 24, 201)
        data = random.make("peaked", case, "float32")
        run = Run("naive", "fwdbwd", Settings(label_smoothing=0.1))
        exact = errors.Reference(None, data, compute=True)
        for count in (1, 2):
            framework = JaxFramework(data, count)
            [row] = runner.measure_runs(
                framework, data, "small", [run], seconds=0.01, commit="abc", reference=exact
            ).rows
            assert len(framework.product().addressable_shards) == count
            for error in (row.hidden_error, row.head_error):
                assert 0 < error < 1e-5
            memory = row.temporary_mb if count == 1 else memory / row.temporary_mb
        assert row.device.startswith("2 × CPU")
        assert memory > 1.5
        try:
            check_devices(2, 63)
        except ValueError as error:
            print(error)
        """,
    )
    assert printed == "63 tokens cannot be split evenly over 2 devices"
