"""The one schema of a result.

To add a metric, put a number under a new name (with its unit) into `metrics`; to show it, add a
`Column` in `report/`.
"""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from hobbit_jax.record.asked import Asked, Benchmark, record_name
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

    @property
    def subject(self) -> str | None:
        """Of a `Benchmark`; None of a trial."""
        return self.asked.subject if isinstance(self.asked, Benchmark) else None

    @property
    def setting(self) -> Mapping[str, Any]:
        """Of a `Benchmark`; empty of a trial."""
        return self.asked.setting if isinstance(self.asked, Benchmark) else {}

    def under(self, prefix: str) -> dict[str, Any]:
        """Metrics and notes whose names begin with `prefix`, by the rest of their names."""
        found = {**self.metrics, **self.notes}
        return {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix)}

    def interval(self, metric: str) -> Interval | None:
        """A metric with its two ends; None where any of the three was not measured."""
        ends = [self.metrics.get(metric + end) for end in ("", "_low", "_high")]
        return None if None in ends else Interval(*(float(end or 0) for end in ends))


@dataclass(frozen=True)
class Measured:
    """The fields of a `Record` that a measurement itself fills."""

    metrics: Mapping[str, float | int | None] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    file_sha256: Mapping[str, str] = field(default_factory=dict)


def measured(result: Any, prefix: str = "") -> Measured:
    """A nested result (mappings, dataclasses, intervals) as flat fields.

    Numbers become metrics, lists samples, words notes; names are joined by `_`. A key `value` or
    `median` adds nothing to the name, so the ends beside it become NAME_low and NAME_high.
    """
    metrics: dict[str, float | int | None] = {}
    samples: dict[str, Any] = {}
    notes: dict[str, str] = {}

    def take(name: str, value: Any) -> None:
        if is_dataclass(value) and not isinstance(value, type):
            value = {f.name: getattr(value, f.name) for f in fields(value)}
        if isinstance(value, Mapping):
            for key, inner in value.items():
                plain = str(key) in ("value", "median") and name
                take(name if plain else "_".join(filter(None, [name, str(key)])), inner)
        elif isinstance(value, str):
            notes[name] = value
        elif isinstance(value, list | tuple):
            samples[name] = list(value)
        else:
            kind: Any = int if isinstance(value, numbers.Integral) else float
            metrics[name] = value if value is None else kind(value)

    take(prefix, result)
    return Measured(metrics, samples, notes)


def combined(*parts: Measured) -> Measured:
    """Several parts of one measurement; none of their names may collide.

    Raises:
        RuntimeError: two parts give one name.
    """
    found: dict[str, dict[str, Any]] = {f.name: {} for f in fields(Measured)}
    for part in parts:
        for name, kept in found.items():
            twice = kept.keys() & getattr(part, name).keys()
            if twice:
                raise RuntimeError(f"{name} {', '.join(sorted(twice))} were measured twice")
            kept.update(getattr(part, name))
    return Measured(**found)
