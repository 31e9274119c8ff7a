"""Settings and runs, from the command line and from JSON."""

import dataclasses
import json

import pytest

from benchmarks.implementations.settings import Run, Settings, gradient_filter, run_from_json


def test_a_run_survives_json():
    run = Run("auto", "fwd", Settings(0.1, 30.0, None, True, True))
    assert run_from_json(json.loads(json.dumps(dataclasses.asdict(run)))) == run
    with pytest.raises(ValueError, match="mode='bwd'; must be one of fwd, fwdbwd"):
        Run("auto", "bwd")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("fused", "fused"), ("none", None), ("1e-4", 1e-4)]
)
def test_gradient_filters_are_read(text: str, value: object):
    assert gradient_filter(text) == value
