"""Rows of a quality frontier, and the comparisons that they allow: in pairs, window by window.

Owns how `FrontierCell` rows are read and averaged over seeds, and every statement that one plan
loses less than another. Intervals are 95 %, by resampling windows and, where a plan has several,
calibration seeds; a difference is taken inside each window and seed first, so it can be told from 0
where two intervals overlap.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from hobbit_jax.report.results import NATIVE, RANDOM, UNIFORM
from hobbit_jax.statistics import RESAMPLES, Interval

BEST_METHOD = "gptq"
_SIGNAL_ORDER = ("sensitivity", "hybrid", "accumulated_weight", "frequency")
STUDY_KEYS = ("method", "formats", "through")  # of a row's config: what only this study has


@dataclass(frozen=True)
class FrontierPlan:
    """A plan but for its seed.

    `calibration_text` is what its signal was measured on where that is not `encoder_text`, which
    its tiers were encoded by; both are empty for the sweep's own.
    """

    signal: str
    formats: tuple[str, ...]
    method: str
    bytes_fraction: float | None
    shares: tuple[float, ...] | None
    through: tuple[str, ...]
    calibration_text: str
    encoder_text: str


@dataclass(frozen=True)
class Measured:
    """One plan over its seeds, in the order of `seeds`."""

    plan: FrontierPlan
    seeds: tuple[int, ...]
    kl_SW: np.ndarray  # nats, mean of each window
    rows: tuple[Mapping[str, Any], ...]

    @property
    def kl(self) -> Interval:
        """Mean KL to the native model."""
        return _interval(self.kl_SW)

    def mean(self, *path: str) -> float | None:
        """The mean over seeds of a number in the rows; None where any row lacks it."""
        values = []
        for row in self.rows:
            value: Any = row
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            values.append(value)
        known = [float(value) for value in values if isinstance(value, int | float)]
        return float(np.mean(known)) if len(known) == len(values) else None

    @property
    def bytes_of_native(self) -> float:
        """Bytes of all experts over native's."""
        return float(
            np.mean(
                [row["store"]["plan_bytes"] / row["store"]["native_bytes"] for row in self.rows]
            )
        )

    def task(self, name: str) -> Interval | None:
        """Score of a task in the first row that has it."""
        for row in self.rows:
            score = (row.get("tasks") or {}).get(name)
            if score:
                return Interval(score["value"], score["low"], score["high"])
        return None


def _interval(kl_SW: np.ndarray) -> Interval:
    """Mean of [seeds, windows] with its 95 % interval; each resample draws both anew."""
    rng = np.random.default_rng(0)
    seeds, windows = kl_SW.shape
    draws = [
        kl_SW[rng.integers(seeds, size=seeds)][:, rng.integers(windows, size=windows)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(kl_SW.mean()), float(low), float(high))


@dataclass(frozen=True)
class FrontierResults:
    """A frontier as found."""

    sweep: Mapping[str, Any]
    measured: tuple[Measured, ...]
    failed: tuple[str, ...]
    missing: int

    @cached_property
    def windows(self) -> int:
        """Evaluation windows of every plan."""
        return self.measured[0].kl_SW.shape[1]

    @cached_property
    def tokens(self) -> int:
        """Held-out tokens of every plan."""
        return self.measured[0].rows[0]["quality"]["tokens"]

    @cached_property
    def uniform(self) -> tuple[Measured, ...]:
        """Plans of one low format, encoded straight from native by the sweep's own text."""
        return tuple(
            m
            for m in self.measured
            if m.plan.signal == UNIFORM and not m.plan.through and not m.plan.encoder_text
        )

    @cached_property
    def mixed(self) -> tuple[Measured, ...]:
        """Static plans of the main study: every tier, the best encoder, the sweep's own text."""
        every = max((m.plan.formats for m in self.measured), key=len)
        found = [
            m
            for m in self.measured
            if m.plan.bytes_fraction is not None
            and (m.plan.formats, m.plan.method) == (every, BEST_METHOD)
            and not m.plan.calibration_text
            and not m.plan.encoder_text
        ]
        return tuple(
            sorted(found, key=lambda m: (m.plan.bytes_fraction or 0, _rank(m.plan.signal)))
        )

    def main_study(self, signal: str, bytes_fraction: float | None) -> Measured | None:
        """The plan of `mixed` by a signal under a limit of bytes."""
        wanted = signal, bytes_fraction
        found = (m for m in self.mixed if (m.plan.signal, m.plan.bytes_fraction) == wanted)
        return next(found, None)

    def own_text_twin(self, measured: Measured) -> Measured | None:
        """The same plan with tiers encoded by the sweep's own text."""
        wanted = replace(measured.plan, encoder_text="")
        return next((other for other in self.measured if other.plan == wanted), None)

    def difference(self, left: Measured, right: Measured) -> Interval | None:
        """KL of `left` less that of `right`, in pairs; None without a seed in common.

        A plan that no seed enters (native, rtn) pairs with every seed of the other.
        """
        pairs = _paired(left, right)
        return None if pairs is None else _interval(pairs[0] - pairs[1])

    def line(self, measured: Measured, method: str) -> Measured | None:
        """The uniform plans of `method` at the bytes of `measured`, by straight lines between.

        Its KL in each window is interpolated between the two neighbours, native's being 0.
        """
        points = [(1.0, np.zeros_like(measured.kl_SW))]
        for other in self.measured:
            plan = other.plan
            same = (plan.method, plan.encoder_text) == (method, measured.plan.encoder_text)
            if plan.signal == UNIFORM and same and not plan.through:
                pair = _paired(other, measured)
                if pair is None:
                    return None
                points.append((other.bytes_of_native, np.broadcast_to(pair[0], pair[1].shape)))
        points.sort(key=lambda point: point[0])
        at = measured.bytes_of_native
        if len(points) < 2 or not points[0][0] <= at <= points[-1][0]:
            return None
        right = next(i for i, (size, _) in enumerate(points) if size >= at)
        (x0, y0), (x1, y1) = points[max(right - 1, 0)], points[right]
        share = 0.0 if x1 == x0 else (at - x0) / (x1 - x0)
        return Measured(measured.plan, measured.seeds, y0 + share * (y1 - y0), measured.rows)


def _rank(signal: str) -> int:
    if signal in _SIGNAL_ORDER:
        return _SIGNAL_ORDER.index(signal)
    return len(_SIGNAL_ORDER) + (signal == RANDOM)


def text_name(text: str) -> str:
    """How a text is called in a table; it is given by its path, or empty for the sweep's own."""
    return PurePath(text).name or "the sweep's own"


def _paired(left: Measured, right: Measured) -> tuple[np.ndarray, np.ndarray] | None:
    """Both [seeds, windows] at the seeds that they share; one without seeds pairs with all."""
    for one, other in ((left, right), (right, left)):
        if one.plan.method == "rtn" and one.plan.signal in (NATIVE, UNIFORM):
            repeated_SW = np.broadcast_to(one.kl_SW, other.kl_SW.shape)
            return (repeated_SW, other.kl_SW) if one is left else (other.kl_SW, repeated_SW)
    common = [seed for seed in left.seeds if seed in right.seeds]
    if not common:
        return None
    return (
        left.kl_SW[[left.seeds.index(seed) for seed in common]],
        right.kl_SW[[right.seeds.index(seed) for seed in common]],
    )


def is_frontier(workdir: Path) -> bool:
    """Whether `workdir` holds rows of this study: the first row with a config decides."""
    for path in sorted((workdir / "rows").glob("*.json")):
        with contextlib.suppress(ValueError, AttributeError):
            config = json.loads(path.read_text(encoding="utf-8")).get("config")
            if isinstance(config, dict):
                return all(key in config for key in STUDY_KEYS)
    return False


def load_frontier(workdir: Path) -> FrontierResults:
    """Reads `sweep.json` and `rows/*.json` of a frontier.

    Raises:
        ValueError: a row that is no row of this study, or none that is finished.
    """
    sweep = json.loads((workdir / "sweep.json").read_text(encoding="utf-8"))
    by_plan: dict[FrontierPlan, dict[int, Mapping[str, Any]]] = {}
    failed = []
    for cell in sweep["cells"]:
        path = workdir / "rows" / f"{cell}.json"
        if not path.exists():
            continue
        row = json.loads(path.read_text(encoding="utf-8"))
        if row.get("status") != "ok":
            failed.append(f"{cell}: {row.get('error')}")
            continue
        try:
            config = row["config"]
            plan = FrontierPlan(
                config["signal"],
                tuple(config["formats"]),
                config["method"],
                config["bytes_fraction"],
                None if config["shares"] is None else tuple(config["shares"]),
                tuple(config["through"]),
                config["calibration_text"],
                config["inputs"]["calibration_text"],
            )
            by_plan.setdefault(plan, {})[config["seed"]] = row
            len(row["quality"]["kl_by_window"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no row of a quality frontier: {error}") from error
    if not by_plan:
        raise ValueError(f"{workdir} holds no finished row; run the sweep first")
    measured = tuple(
        Measured(
            plan,
            tuple(sorted(rows)),
            np.array([rows[seed]["quality"]["kl_by_window"] for seed in sorted(rows)]),
            tuple(rows[seed] for seed in sorted(rows)),
        )
        for plan, rows in by_plan.items()
    )
    done = sum(len(m.seeds) for m in measured)
    return FrontierResults(sweep, measured, tuple(failed), len(sweep["cells"]) - done - len(failed))


def tier_overlap(left: Measured, right: Measured) -> tuple[float, float] | None:
    """How alike two static plans are: share of pairs at one tier, and Spearman's correlation.

    Of the first seed in common, over all (layer, expert) pairs; tiers are ranks, ties averaged.
    """
    common = [seed for seed in left.seeds if seed in right.seeds]
    if not common:
        return None
    tiers = []
    for measured in (left, right):
        row = measured.rows[measured.seeds.index(common[0])]
        tiers.append(np.asarray(row["tier_LE"]).reshape(-1))
    if tiers[0].size == 0 or tiers[0].shape != tiers[1].shape:
        return None
    same = float((tiers[0] == tiers[1]).mean())
    first, second = (_average_ranks(values) for values in tiers)
    if first.std() == 0 or second.std() == 0:
        return None
    return same, float(np.corrcoef(first, second)[0, 1])


def _average_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
