"""`python -m benchmarks.paper.penalties`: the trainer with two more losses."""

from __future__ import annotations

from train import start

if __name__ == "__main__":
    start.begin("python -m benchmarks.paper.penalties")  # the imports below take a second

import sys
from collections.abc import Sequence

from benchmarks.paper.penalties import MODULES
from lsce import backends
from train import __main__ as train


def main(arguments: Sequence[str] | None = None) -> int:
    """What `python -m train` returns."""
    backends.MODULES.update(MODULES)  # behind its own, so that "auto" is what it was
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(start.run(main))
