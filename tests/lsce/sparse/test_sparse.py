"""What GPU backends share is plain JAX: one for another GPU loads none of Hopper's kernels."""

import on_devices

SCRIPT = """
    import importlib
    import pkgutil
    import sys
    import lsce.sparse
    for module in pkgutil.iter_modules(lsce.sparse.__path__):
        importlib.import_module(f"lsce.sparse.{module.name}")
    assert "lsce.sparse.plan" in sys.modules
    kernels = "lsce.backends.hopper", "jax.experimental.pallas", "jax.experimental.mosaic"
    print([name for name in sys.modules if name.startswith(kernels)])
"""


def test_no_kernels_are_loaded():
    assert on_devices.run(1, SCRIPT) == "[]"
