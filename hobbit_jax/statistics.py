"""Intervals: every reported figure comes with how far it could be off.

Owns which of SciPy's intervals is used for what: the bootstrap over whole windows (tokens of one
window are not independent), Wilson's interval for shares, and the spread of repeated timings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray | float], n_units: int) -> Interval:
    """95 % percentile interval of a statistic of units drawn with replacement.

    Args:
        statistic: maps int indices [n_units] of the drawn units to the figure.
        n_units: windows or problems; of a single one the interval is the figure alone.
    """
    from scipy import stats  # takes most of a second, which scripts without intervals save

    value = float(statistic(np.arange(n_units)))
    if n_units == 1:
        return Interval(value, value, value)
    draws = stats.bootstrap(
        (np.arange(n_units),),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def share(correct: int, total: int) -> Interval:
    """Wilson's 95 % interval of a share; honest at 0 and at 1, where a bootstrap is not.

    Raises:
        ValueError: fewer than one trial.
    """
    if total < 1:
        raise ValueError(f"a share of {total} trials; want at least one")
    from scipy import stats

    ends = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    p = correct / total
    # Rounding may push a bound past p itself, at 0 and at 1.
    return Interval(p, min(float(ends.low), p), max(float(ends.high), p))


def spread(values: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range (`low`, `high`) of repeated measurements."""
    names = ("low", "quartile_low", "median", "quartile_high", "high")
    found = np.quantile(np.asarray(values), [0, 0.25, 0.5, 0.75, 1])
    return dict(zip(names, found.tolist(), strict=True))
