"""What a figure may depend on: versions of Python and of packages, and the checkout's commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = "lsce", "jax", "flax", "optax", "numpy"
ROOT = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str | None]:
    """The packages', None for what is not installed, as `lsce` where it is imported from a
    checkout, whose commit then stands for it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    return {**found, **{name: _version(name) for name in PACKAGES}, "commit": commit()}


def commit(root: Path = ROOT) -> str | None:
    """That of the checkout that this is in, `-dirty` where files have changed since; None without
    git, or where this is installed, be it in an environment inside somebody's own checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    return _git(root, "describe", "--always", "--dirty", "--exclude=*")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
