"""Strictness for every test: no silent broadcasting of ranks, no dtypes mixed in silence, and
checked shape annotations.

The import hook checks the annotations of the modules behind the public functions. The doors
themselves (`lsce.api` with `lsce.problem`, `lsce.order`, `lsce.calibration`) check their arguments
by hand, with messages for users, and the tests must see those.
"""

import gc
import os
from pathlib import Path

from paths import ROOT

# What one worker, subprocess or run has compiled another loads: about half of the time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**29))  # with a lock on the folder
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# The kernels' interpreter blocks a thread of XLA's pool for every warpgroup that waits: with no
# more threads than a small machine's cores it stands still for ever. Read when XLA starts.
os.environ.setdefault("NPROC", "16")

import jax
import jaxtyping
import optax
import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("attending", "contract", "hopper_on_cpu", "on_devices", "tail_check")

# A busy machine is no failure: examples are counted, not timed.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

CHECKED = ["backends", "formula", "sparse", "stats", "sums", "wanted"]
hook = jaxtyping.install_import_hook([f"lsce.{name}" for name in CHECKED], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def bias_correction(*args, of=optax.tree.bias_correction):
    """Adam's: a float to the power of an integer. Nothing else may mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        return of(*args)


optax.tree.bias_correction = bias_correction

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def room_for_programs():
    """The code of every compiled program takes maps, of which Linux gives a process 65,530: a
    worker of the whole suite would run out of them, and XLA crash."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def quickly_compiled():
    """For tests that compile much and run little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_collection_finish():
    """What is imported by now stays: the collector need not look through it again and again."""
    gc.freeze()


ON_A_GPU = {
    ROOT / "tests" / module
    for module in (
        "lsce/test_loss.py",
        "lsce/backends/hopper/test_gpu.py",
        "train/models/test_gpu.py",
        "train/run/test_gpu.py",
    )
}


def pytest_collection_modifyitems(items):
    """Other tests hold a CPU to float32's exactness, or run the kernels' interpreter there."""
    if jax.default_backend() != "cpu":
        for item in items:
            if item.path not in ON_A_GPU:
                item.add_marker(pytest.mark.skip(reason="of a CPU: set JAX_PLATFORMS=cpu"))
