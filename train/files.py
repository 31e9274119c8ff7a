"""Files that are there as a whole or not at all, whenever the process dies; the user's cache."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

PART = ".tmp"
"""Ends the name of what is being written. A kill may leave such a file, and the next write takes
its place."""


def write(path: Path, content: str | bytes) -> None:
    """Puts a file at `path`, or in the place of the one there, in one atomic step.

    Raises OSError if it cannot be written; what was there stays.
    """
    part = path.with_name(path.name + PART)
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # where a disk is full, its room is needed
        raise


def write_json(path: Path, value: Any) -> None:
    """`write` of a value as JSON for people: indented, a line at the end, no NaN."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold: paths as text, tuples as lists, null for what is not a finite number."""
    match value:
        case dict():
            return {key: plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [plain(entry) for entry in value]
        case Path():
            return str(value)
        case float():
            return value if math.isfinite(value) else None
    return value


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lsce`, or `~/.cache/lsce`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsce"
