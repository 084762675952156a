"""Intervals: every reported figure comes with how far it could be off.

Owns the bootstrap over whole windows (tokens of one window are not independent), Wilson's interval
for shares, and the spread of repeated timings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
Z_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray | float], n_units: int, seed: int = 0
) -> Interval:
    """95 % percentile interval of a statistic of units drawn with replacement.

    Args:
        statistic: maps int indices [n_units] of the drawn units to the figure.
        n_units: windows or problems.
    """
    rng = np.random.default_rng(seed)
    draws = [float(statistic(rng.integers(n_units, size=n_units))) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(statistic(np.arange(n_units))), float(low), float(high))


def share(correct: int, total: int) -> Interval:
    """Wilson's 95 % interval of a share; honest at 0 and at 1, where a bootstrap is not."""
    if total < 1:
        raise ValueError(f"a share of {total} trials; want at least one")
    p, z2 = correct / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    spread = Z_95 / (1 + z2 / total) * np.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    # Rounding may push a bound past 0 or 1, where it is p itself.
    low, high = max(0.0, float(centre - spread)), min(1.0, float(centre + spread))
    return Interval(p, min(low, p), max(high, p))


def spread(values: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range of repeated measurements, for a row."""
    names = ("min", "quartile_low", "median", "quartile_high", "max")
    return dict(
        zip(names, np.quantile(np.asarray(values), [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True)
    )
