"""Comparisons between rows: what "below the control" and "equally fast" mean.

Owns every statement that one plan is better than another: a signal against the random control, a
mixed plan against the uniform quants at its bytes, one timing against another. Two intervals differ
only where they do not touch; that is stricter than a paired test would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hobbit_jax.report.results import NATIVE, RANDOM, UNIFORM, Plan, Results, Row
from hobbit_jax.statistics import Interval

ZERO = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ControlGap:
    """A signal's KL against the random control at the same share and format.

    For residency the share is what was degraded: between the random plans, native and the uniform
    quant at the same budget a straight line. With several seeds of the control, `control` has their
    mean and outermost ends.
    """

    control: Interval
    difference: float
    relation: str  # "below", "above" or "not separate"


def control_gap(plan: Plan, results: Results) -> ControlGap | None:
    """None where the plan or its control has no KL."""
    own = results.quality_row(plan)
    if own is None or own.kl_mean is None:
        return None
    kls = _controls_by_degraded(own, results) if plan.residency else _controls(plan, results)
    if not kls:
        return None
    control = Interval(
        float(np.mean([kl.value for kl in kls])),
        min(kl.low for kl in kls),
        max(kl.high for kl in kls),
    )
    relation = "not separate"
    if above(control, own.kl_mean):
        relation = "below"
    elif above(own.kl_mean, control):
        relation = "above"
    return ControlGap(control, own.kl_mean.value - control.value, relation)


def _controls(plan: Plan, results: Results) -> list[Interval]:
    kls = []
    for other in results.plans:
        if other.signal == RANDOM and other.order[3:5] == plan.order[3:5]:
            row = results.quality_row(other)
            if other.model == plan.model and row and row.kl_mean:
                kls.append(row.kl_mean)
    return kls


def _controls_by_degraded(own: Row, results: Results) -> list[Interval]:
    """One control a seed: what a random choice of as many uses loses."""
    wanted = own.decode and own.decode.degraded_fraction
    if wanted is None:
        return []
    by_seed: dict[int, list[tuple[float, Interval]]] = {}
    ends = [(0.0, ZERO)]
    for row in results.rows:
        plan, degraded = row.plan, row.decode and row.decode.degraded_fraction
        if row.setting != own.setting or plan.low_format != own.plan.low_format:
            continue
        if degraded is None or row.kl_mean is None:
            continue
        if plan.signal == RANDOM:
            by_seed.setdefault(plan.seed, []).append((degraded, row.kl_mean))
        elif plan.signal == UNIFORM:
            ends.append((degraded, row.kl_mean))
    controls = []
    for points in by_seed.values():
        known = sorted([*points, *ends], key=lambda point: point[0])
        if wanted <= known[-1][0]:
            controls.append(_interpolate(wanted, known))
    return controls


def _interpolate(at: float, points: Sequence[tuple[float, Interval]]) -> Interval:
    """The straight line through `points`, (place, interval) in ascending order of place."""
    places = [place for place, _ in points]
    ends = zip(*((kl.value, kl.low, kl.high) for _, kl in points), strict=True)
    return Interval(*(float(np.interp(at, places, end)) for end in ends))


@dataclass(frozen=True)
class LineGap:
    """A mixed plan's KL against the uniform quants' at its own bytes."""

    line: Interval | None
    relation: str  # "better", "worse", "equal within the intervals", or why there is no line


def uniform_points(model: str, results: Results) -> list[tuple[str, float, Interval]]:
    """(label, bytes, KL) of native and the uniform quants, by bytes; native's KL is 0."""
    points: dict[str, tuple[str, float, Interval]] = {}
    for row in results.rows:
        if row.plan.model == model and row.store and row.store.native_bytes is not None:
            points[NATIVE] = (NATIVE, row.store.native_bytes, ZERO)
            break
    for plan in results.plans:
        row = results.quality_row(plan)
        if plan.signal != UNIFORM or plan.model != model or row is None:
            continue
        if row.kl_mean is not None and row.plan_bytes is not None:
            point = (results.label(plan), row.plan_bytes, row.kl_mean)
            points.setdefault(plan.low_format or "", point)
    return sorted(points.values(), key=lambda point: (point[1], point[0]))


def line_gap(plan: Plan, results: Results) -> LineGap:
    """Compares with the straight line between the two neighbouring uniform plans."""
    own = results.quality_row(plan)
    if own is None or own.kl_mean is None or own.plan_bytes is None:
        return LineGap(None, "not measured")
    points = uniform_points(plan.model, results)
    if len(points) < 2:
        return LineGap(None, "too few uniform plans")
    if own.plan_bytes > points[-1][1]:
        return LineGap(None, f"larger than {points[-1][0]}")
    if own.plan_bytes < points[0][1]:
        return LineGap(None, f"smaller than {points[0][0]}")
    line = _interpolate(own.plan_bytes, [(size, kl) for _, size, kl in points])
    if above(line, own.kl_mean):
        return LineGap(line, "better")
    if above(own.kl_mean, line):
        return LineGap(line, "worse")
    return LineGap(line, "equal within the intervals")


def above(upper: Interval, lower: Interval) -> bool:
    """Whether `upper` lies wholly above `lower`; intervals that touch do not."""
    return upper.low > lower.high


def compare_speed(row: Row, native: Row) -> str | None:
    """ "faster", "slower" or "equal"; None where the timings cannot be compared.

    Timings of different devices, and single repeats (no spread), cannot. Ranges that touch
    are equal.
    """
    if row.decode is None or native.decode is None or row.device != native.device:
        return None
    own, rival = row.decode.tokens_per_second, native.decode.tokens_per_second
    if own is None or rival is None or min(row.decode.repeats, native.decode.repeats) < 2:
        return None
    if above(own, rival):
        return "faster"
    return "slower" if above(rival, own) else "equal"


def bound_tokens_per_second(row: Row, device_gb_s: float, pcie_gb_s: float) -> float | None:
    """Most tokens/s that the expert traffic allows on a card of these bandwidths.

    1 / max(bytes used / device bandwidth, bytes moved / PCIe bandwidth). It knows no dense
    layers, no latency and no compute, and assumes that copies overlap completely.
    """
    if row.decode is None:
        return None
    used, moved = row.decode.bytes_used_per_token, row.decode.bytes_moved_per_token
    if used is None or moved is None:
        return None
    seconds = max(used / (device_gb_s * 1e9), moved / (pcie_gb_s * 1e9))
    return 1 / seconds if seconds > 0 else None


def use_shares(selections_LE: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Each expert's share (0-1) of its layer's selections, float64 [L, E], largest first."""
    counts_LE = np.asarray(selections_LE, np.float64)
    totals_L1 = counts_LE.sum(axis=1, keepdims=True)
    if not np.all(totals_L1 > 0):
        return None
    return -np.sort(-counts_LE / totals_L1, axis=1)
