"""What a run makes of its configuration before the first step."""

import dataclasses

import jax
import pytest

from train.models.config import MOST_WRITTEN_OUT, PRESETS
from train.run.loop import written_out


@pytest.mark.parametrize(
    ("backend", "layers", "scan"),
    [("gpu", MOST_WRITTEN_OUT, "off"), ("gpu", MOST_WRITTEN_OUT + 1, "on"), ("cpu", 2, "on")],
)
def test_layers_are_written_out_where_that_pays(monkeypatch, backend, layers, scan):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    shape = dataclasses.replace(PRESETS["nano"], layers=layers)
    assert shape.scan == "on"  # what is repeatable
    assert written_out(shape) == dataclasses.replace(shape, scan=scan)
