"""Where things are, for tests at any depth of the tree."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real data that some machines have beside the checkout; tests that need it skip without it."""
