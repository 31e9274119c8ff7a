"""One measured step, and the table of several."""

import dataclasses
from collections.abc import Sequence

from benchmarks.steps.variant import PEAK_FLOPS, Variant


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a framework finds of a variant. Times in ms, memory in GB of 10⁹ bytes."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    first_loss: float
    last_loss: float
    """After some steps on the same batch: it must have fallen."""
    state_gb: float
    """Weights and optimizer, on one device."""
    peak_gb: float
    """State, batch and all that a step needs, by the compiler's plan or the allocator's peak; on
    one device."""
    compile_s: float
    attention: str
    device: str
    framework: str


@dataclasses.dataclass(frozen=True)
class StepRow:
    model: str
    variant: Variant
    length: int
    segments_per_row: float
    flops_per_token: float
    """See `benchmarks.steps.variant.flops_per_token`."""
    measured: Measured | None
    error: str | None
    """Why there is none."""
    commit: str
    time: str
    """UTC, ISO 8601."""
    checkpoint: str | None = None
    """Whose weights, and on what text; None for random ones."""

    @property
    def tokens_per_s(self) -> float | None:
        """Padding included."""
        if self.measured is None:
            return None
        tokens = self.variant.rows * self.variant.accumulate * self.length
        return tokens / self.measured.p50_ms * 1e3

    @property
    def mfu(self) -> float | None:
        """Operations that had to be made, of those that the devices could; None where unknown."""
        peaks = [
            peak
            for name, peak in PEAK_FLOPS.items()
            if self.measured and name in self.measured.device
        ]
        if not peaks or self.tokens_per_s is None:
            return None
        possible = peaks[0] * self.variant.devices.size
        return self.tokens_per_s * self.flops_per_token / possible


def why(error: Exception) -> str:
    """What a row says of what was raised: its kind and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition('\n')[0]}"


def markdown(rows: Sequence[StepRow]) -> str:
    lines = [
        "| model | step | segments a row | ms | tokens/s | MFU | state GB | peak GB | compile s |"
        " attention | loss |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        name = str(row.variant) + (" real" if row.checkpoint else "")
        cells = [row.model, name, f"{row.segments_per_row:.1f}"]
        if found := row.measured:
            mfu = row.mfu
            cells += [
                f"{found.p50_ms:.2f}",
                f"{row.tokens_per_s:,.0f}",
                "–" if mfu is None else f"{mfu:.1%}",
                f"{found.state_gb:.2f}",
                f"{found.peak_gb:.2f}",
                f"{found.compile_s:.0f}",
                found.attention,
                f"{found.first_loss:.3f} → {found.last_loss:.3f}",
            ]
        else:
            cells += [row.error or "", *[""] * 7]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
