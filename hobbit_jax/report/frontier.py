"""Studies of quality alone: plans over their seeds, and comparisons window by window.

Owns how records of `QualityTrial` are averaged over calibration seeds and what may be compared.
Intervals are 95 %, by resampling windows and, where a plan has several, seeds; a difference is
taken inside each window and seed first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import stats

from hobbit_jax.record import (
    MixedInBytes,
    Native,
    PerSelection,
    QualityTrial,
    Record,
    Records,
    Study,
    Uniform,
    low_formats,
)
from hobbit_jax.report.paired import line_at
from hobbit_jax.report.sweep import RANDOM
from hobbit_jax.statistics import RESAMPLES, Interval

BEST_ENCODER = "gptq"
ENCODERS = ("rtn", "importance", "ggml", BEST_ENCODER)
_SCORES = ("sensitivity", "hybrid", "accumulated_weight", "frequency")


@dataclass(frozen=True)
class Averaged:
    """One plan over its seeds, in the order of `seeds`.

    `text` is the calibration text of the trial, by which experts were encoded; empty is the
    shipped one.
    """

    plan: Native | Uniform | MixedInBytes | PerSelection
    text: str
    seeds: tuple[int, ...]
    kl_SW: np.ndarray  # nats, mean of each window
    records: tuple[Record, ...]

    @property
    def kl(self) -> Interval:
        """Mean KL to the native model."""
        return interval(self.kl_SW)

    @property
    def score(self) -> str:
        """Of a mix; of others what they are."""
        return getattr(self.plan, "score", type(self.plan).__name__.lower())

    @property
    def formats(self) -> tuple[str, ...]:
        """Below native."""
        return low_formats(self.plan)

    @property
    def encoder(self) -> str:
        """Of the low formats; native has none and counts as the plainest."""
        return getattr(self.plan, "encoder", ENCODERS[0])

    @property
    def through(self) -> tuple[str, ...]:
        """Formats that the weights were rounded to before."""
        return getattr(self.plan, "through", ())

    @property
    def limit(self) -> float | None:
        """Fraction of native's bytes that a mix was given."""
        return getattr(self.plan, "bytes_fraction", None)

    def mean(self, metric: str) -> float | None:
        """Over the seeds; None where any record lacks it."""
        values = [record.metrics.get(metric) for record in self.records]
        return None if None in values else float(np.mean(values))  # pyright: ignore

    @property
    def bytes_of_native(self) -> float:
        """Bytes of all experts over native's."""
        parts = [
            [r.metrics[n] or 0 for n in ("stored_bytes", "native_bytes")] for r in self.records
        ]
        return float(np.mean([stored / native for stored, native in parts]))

    def task(self, name: str) -> Interval | None:
        """Score of a task in the first record that has it."""
        found = (record.interval(f"task_{name}") for record in self.records)
        return next((score for score in found if score), None)

    @property
    def seed_range(self) -> str | None:
        """The least and the largest KL over calibration draws."""
        means = self.kl_SW.mean(axis=1)
        return f"{means.min():.4f} to {means.max():.4f}" if len(means) > 1 else None


def interval(kl_SW: np.ndarray) -> Interval:
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
class Frontier:
    """A study of quality as found."""

    study: Study
    plans: tuple[Averaged, ...]
    failed: tuple[Record, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, study: Study, found: Records) -> Frontier:
        """The study that `study` describes.

        Raises:
            ValueError: no finished record.
        """
        by_name = {record.name: record for record in found.of(study.name)}
        asked = [by_name[name] for name in study.trials if name in by_name]
        groups: dict[tuple[object, str], dict[int, Record]] = {}
        for record in asked:
            trial = record.asked
            if isinstance(trial, QualityTrial) and record.status == "ok":
                key = (trial.plan, trial.inputs.calibration_text)
                groups.setdefault(key, {})[trial.seed] = record
        if not groups:
            raise ValueError(f"the study {study.name} has no finished record; run the sweep first")
        plans = []
        for (plan, text), records in groups.items():
            seeds, ordered = zip(*sorted(records.items()), strict=True)
            kl_SW = np.array([record.samples["kl_nats_W"] for record in ordered])
            plans.append(Averaged(plan, text, seeds, kl_SW, ordered))  # pyright: ignore
        failed = tuple(record for record in asked if record.status == "failed")
        missing = tuple(name for name in study.trials if name not in by_name)
        return cls(study, tuple(plans), failed, missing)

    @cached_property
    def own_text(self) -> str:
        """The calibration text of most plans."""
        texts = [p.text for p in self.plans if not isinstance(p.plan, Native)]
        return max(texts, key=texts.count, default="")

    @cached_property
    def uniform(self) -> tuple[Averaged, ...]:
        """Plans of one low format, encoded straight from native by the study's own text."""
        return tuple(
            p
            for p in self.plans
            if isinstance(p.plan, Uniform) and not p.through and p.text == self.own_text
        )

    @cached_property
    def mixed(self) -> tuple[Averaged, ...]:
        """Mixes of the main study: every format, the best encoder, the study's own text."""
        every = max((p.formats for p in self.plans), key=len)
        found = [
            p
            for p in self.plans
            if isinstance(p.plan, MixedInBytes)
            and (p.formats, p.encoder, p.text) == (every, BEST_ENCODER, self.own_text)
            and not p.plan.score_text
        ]
        last = len(_SCORES)
        rank = {score: n for n, score in enumerate(_SCORES)} | {RANDOM: last + 1}
        return tuple(sorted(found, key=lambda p: (p.limit or 0, rank.get(p.score, last))))

    def main_plan(self, score: str, limit: float | None) -> Averaged | None:
        """The plan of `mixed` by a score under a limit of bytes."""
        return next((p for p in self.mixed if (p.score, p.limit) == (score, limit)), None)

    def difference(self, left: Averaged | None, right: Averaged | None) -> Interval | None:
        """KL of `left` less that of `right`, in pairs; None without both or a seed in common.

        A plan that no seed enters (native, rtn) pairs with every seed of the other.
        """
        if left is None or right is None or left is right:
            return None
        pairs = _paired(left, right)
        return None if pairs is None else interval(pairs[0] - pairs[1])

    def line(self, averaged: Averaged, encoder: str = BEST_ENCODER) -> Averaged | None:
        """The uniform plans of `encoder` at the bytes of a plan, by straight lines between.

        KL in each window is interpolated between the two neighbours; native's is 0.
        """
        points = [(1.0, np.zeros_like(averaged.kl_SW))]
        for other in self.plans:
            same = (other.encoder, other.text) == (encoder, averaged.text)
            if isinstance(other.plan, Uniform) and same and not other.through:
                pair = _paired(other, averaged)
                if pair is None:
                    return None
                points.append((other.bytes_of_native, np.broadcast_to(pair[0], pair[1].shape)))
        kl_SW = line_at(averaged.bytes_of_native, points) if len(points) > 1 else None
        return None if kl_SW is None else replace(averaged, kl_SW=kl_SW)

    def bytes_read(self, averaged: Averaged) -> float | None:
        """Bytes that one use of an expert reads, over native's."""
        own = averaged.mean("bytes_read_per_selection")
        native = next((p for p in self.plans if isinstance(p.plan, Native)), None)
        base = native.mean("bytes_read_per_selection") if native else None
        return own / base if own and base else None


def _paired(left: Averaged, right: Averaged) -> tuple[np.ndarray, np.ndarray] | None:
    """Both [seeds, windows] at the seeds that they share; one without seeds pairs with all."""
    for one, other in ((left, right), (right, left)):
        if one.encoder == "rtn" and isinstance(one.plan, Native | Uniform):
            repeated_SW = np.broadcast_to(one.kl_SW, other.kl_SW.shape)
            return (repeated_SW, other.kl_SW) if one is left else (other.kl_SW, repeated_SW)
    common = [seed for seed in left.seeds if seed in right.seeds]
    if not common:
        return None
    return (
        left.kl_SW[[left.seeds.index(seed) for seed in common]],
        right.kl_SW[[right.seeds.index(seed) for seed in common]],
    )


def overlap(left: Averaged, right: Averaged | None) -> tuple[float, float] | None:
    """How alike two mixes are: share of experts at one precision, and Spearman's correlation.

    Of the first seed in common, over all (layer, expert) pairs; precisions are ranks.
    """
    common = [seed for seed in left.seeds if right and seed in right.seeds]
    if right is None or not common:
        return None
    first, second = (
        np.ravel(p.records[p.seeds.index(common[0])].samples["precision_LE"]) for p in (left, right)
    )
    if not first.size or first.shape != second.shape or 0 in (np.ptp(first), np.ptp(second)):
        return None
    correlation = stats.spearmanr(first, second).statistic  # pyright: ignore
    return float((first == second).mean()), float(correlation)
