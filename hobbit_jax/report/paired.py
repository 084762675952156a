"""Paired comparisons: two plans on the same windows of text, and on the same problems.

Owns every interval of a difference between records of a sweep. Windows share most of their
variation between plans, so a difference is taken within each window first. Intervals are 95 %, by
Student's t, which stays honest for a handful of windows.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

from hobbit_jax.record import Record
from hobbit_jax.statistics import Interval


def kl_nats_W(record: Record) -> np.ndarray | None:
    """Mean KL of each evaluation window; None where it was not measured."""
    found = record.samples.get("kl_nats_W")
    return None if not found else np.asarray(found, np.float64)


def mean_interval(values_N: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean of independent values with its interval; of a single one the interval is unbounded."""
    mean = float(values_N.mean())
    if len(values_N) < 2:
        return Interval(mean, -math.inf, math.inf)
    if np.ptp(values_N) == 0:
        return Interval(mean, mean, mean)
    ends = stats.ttest_1samp(values_N, 0).confidence_interval(confidence)
    return Interval(mean, float(ends.low), float(ends.high))


def difference(left: np.ndarray, right: np.ndarray, confidence: float = 0.95) -> Interval:
    """`left` less `right` within the windows that both have; these are the first of each."""
    common = min(len(left), len(right))
    return mean_interval(left[:common] - right[:common], confidence)


def ratio_over_prompts(record: Record, native: Record, name: str) -> Interval | None:
    """A count a token over native's, in pairs of prompts; None without each prompt's.

    The interval is Student's t of what a prompt has more than the ratio says.
    """
    own_R, native_R = (
        np.asarray(r.samples.get(f"{name}_per_token_R", ())) for r in (record, native)
    )
    if not own_R.size or own_R.shape != native_R.shape or not native_R.any():
        return None
    ratio = float(own_R.mean() / native_R.mean())
    off = mean_interval((own_R - ratio * native_R) / native_R.mean())
    return Interval(ratio, ratio + off.low, ratio + off.high)


def relation(gap: Interval | None) -> str | None:
    """ "below" or "above" 0, or "not told apart" where the interval has it inside; None of None."""
    if gap is None:
        return None
    if gap.high < 0:
        return "below"
    return "above" if gap.low > 0 else "not told apart"


def line_at(x: float, points: Sequence[tuple[float, np.ndarray]]) -> np.ndarray | None:
    """KL of each window on straight lines between `points` (x, KL of windows), at `x`.

    None outside of them: nothing is extrapolated. Of several points at one x the least KL counts.
    """
    if not points:
        return None
    common = min(len(kl_W) for _, kl_W in points)
    best: dict[float, np.ndarray] = {}
    for place, kl_W in points:
        if place not in best or kl_W[:common].mean() < best[place].mean():
            best[place] = kl_W[:common]
    places = sorted(best)
    if not places[0] <= x <= places[-1]:
        return None
    right = next(i for i, place in enumerate(places) if place >= x)
    left = max(right - 1, 0)
    width = places[right] - places[left]
    share = (x - places[left]) / width if width else 0.0
    return (1 - share) * best[places[left]] + share * best[places[right]]


def undominated(points: Sequence[tuple[float, np.ndarray]]) -> list[tuple[float, np.ndarray]]:
    """Of (bytes or cost, KL of windows) those that no other beats in both."""
    return [
        (place, kl)
        for place, kl in points
        if not any(x < place and other.mean() < kl.mean() for x, other in points)
    ]


def points(
    records: Iterable[Record], at: Callable[[Record], float | None]
) -> list[tuple[float, np.ndarray]]:
    """Where `at` puts each record, with its KL of windows; those without either are left out."""
    found = ((at(record), kl_nats_W(record)) for record in records)
    return [(float(x), kl_W) for x, kl_W in found if x is not None and kl_W is not None]


def mcnemar(record: Record, other: Record, task: str) -> tuple[int, int, float] | None:
    """Problems that `record` alone solves, those that `other` alone solves, and the two-sided p of
    McNemar's exact test that both are as good.

    None where either lacks the result of each problem, or where their numbers of problems differ.
    """
    own, rival = (np.array(r.samples.get(f"{task}_solved", ()), bool) for r in (record, other))
    if not own.size or own.shape != rival.shape:
        return None
    gained, lost = int((own & ~rival).sum()), int((rival & ~own).sum())
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return gained, lost, float(p)


def task_loss(record: Record, native: Record, task: str) -> Interval | None:
    """Share of problems that `record` solves less than `native`, in pairs problem by problem.

    Records without each problem's result have Newcombe's interval of two independent shares,
    which is wider. None where either was not scored.
    """
    solved, lost = (np.array(r.samples.get(f"{task}_solved", ()), float) for r in (native, record))
    if solved.size and solved.shape == lost.shape:
        loss_N = solved - lost
        if not loss_N.any():  # no problem tells them apart: what so few problems can exclude
            most = 1 - 0.025 ** (1 / loss_N.size)
            return Interval(0.0, -most, most)
        return mean_interval(loss_N)
    before, after = (r.interval(task) for r in (native, record))
    if before is None or after is None:
        return None
    loss = before.value - after.value
    low = math.hypot(before.value - before.low, after.high - after.value)
    high = math.hypot(before.high - before.value, after.value - after.low)
    return Interval(loss, loss - low, loss + high)
