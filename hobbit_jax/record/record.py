"""The one schema of a result.

To add a metric, put a number under a new name (with its unit) into `metrics`; to show it, add a
`Column` in `report/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hobbit_jax.record.asked import Asked, record_name
from hobbit_jax.statistics import Interval


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        study: the study that it belongs to, also the name of its JSONL file.
        asked: what was asked; its identity.
        metrics: numbers by name, with the unit in the name; None was not measured. The ends of a
            95 % interval (or of the range of repeats) stand under NAME_low and NAME_high.
        samples: raw lists behind the metrics: seconds of repeats, KL of windows, counts.
        notes: words that are neither metric nor setting.
        file_sha256: hashes of model, texts, low-precision files and calibration.
        revision: commit of the checkout, with "+dirty" for uncommitted changes.
        device, device_count, cpu_count, versions: what it ran on and with.
        seconds: wall-clock time of the whole measurement.
        status, error: a trial that failed has a record too, with the reason.
    """

    study: str
    asked: Asked
    metrics: Mapping[str, float | int | None] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    file_sha256: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    device: str | None = None
    device_count: int | None = None
    cpu_count: int | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    seconds: float | None = None
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None

    @property
    def name(self) -> str:
        """See `record_name`."""
        return record_name(self.asked)

    def interval(self, metric: str) -> Interval | None:
        """A metric with its two ends; None where any of the three was not measured."""
        ends = [self.metrics.get(metric + end) for end in ("", "_low", "_high")]
        return None if None in ends else Interval(*(float(end or 0) for end in ends))


def flat(name: str, value: Any) -> dict[str, float | int | None]:
    """A number, an `Interval`, or a mapping of those, as metrics; names are joined by `_`."""
    if isinstance(value, Interval):
        return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    if isinstance(value, Mapping):
        found: dict[str, float | int | None] = {}
        for key, inner in value.items():
            found |= flat(f"{name}_{key}" if name else str(key), inner)
        return found
    return {name: value}
