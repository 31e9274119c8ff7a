"""What a test patches is seen by its own calls, and by no later test's."""

import jax
import pytest


@pytest.fixture(autouse=True)
def traced_anew_where_patched(request):
    """A call of which JAX has a trace already runs none of what is patched."""
    patched = "monkeypatch" in request.fixturenames
    if patched:
        jax.clear_caches()
    yield
    if patched:
        jax.clear_caches()
