"""What implementations refuse."""

from benchmarks.implementations.implementation import unsupported
from benchmarks.implementations.settings import Settings


def test_refusals_name_every_missing_option():
    everything = Settings(0.1, 30.0, "fused", True, True)
    assert unsupported(everything, ("smoothing", "softcap")) == (
        "has no filter and no vocabulary order and no statistics"
    )
    assert unsupported(Settings(gradient_filter=None), ()) == "has no exact"
    assert unsupported(Settings(gradient_filter=None), ("exact",)) is None
    assert unsupported(Settings(gradient_filter=0.1), ("filter",)) is None
    assert unsupported(Settings(), ()) is None
