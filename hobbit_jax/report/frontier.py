"""Studies of quality alone: plans over their seeds, and comparisons window by window.

Owns how records of `QualityTrial` are averaged over calibration seeds and what may be compared.
Intervals are 95 %, by resampling windows and, where a plan has several, seeds; a difference is
taken inside each window and seed first.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np

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
from hobbit_jax.report.paired import line_at, undominated
from hobbit_jax.report.sweep import RANDOM
from hobbit_jax.statistics import RESAMPLES, Interval, bootstrap

BEST_ENCODER = "gptq"
ENCODERS = ("rtn", "importance", "ggml", BEST_ENCODER)
_SCORES = ("sensitivity", "hybrid", "accumulated_weight", "frequency")


def _of_plan(field: str, default: Any, doc: str) -> Any:
    """A field of a plan, and what a plan without it counts as."""
    return property(lambda averaged: getattr(averaged.plan, field, default), doc=doc)


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

    def at_seeds(self, seeds: Sequence[int]) -> np.ndarray:
        """KL of these seeds, which it has, nats [seeds, windows]."""
        return self.kl_SW[[self.seeds.index(seed) for seed in seeds]]

    @property
    def score(self) -> str:
        """Of a mix; of others what they are."""
        return getattr(self.plan, "score", type(self.plan).__name__.lower())

    @property
    def formats(self) -> tuple[str, ...]:
        """Below native."""
        return low_formats(self.plan)

    encoder = _of_plan("encoder", ENCODERS[0], "Of the low formats; native's is the plainest.")
    through = _of_plan("through", (), "Formats that the weights were rounded to before.")
    roles = _of_plan("roles", (), "The matrices that are encoded; none named are all.")
    limit = _of_plan("bytes_fraction", None, "Fraction of native's bytes that a mix was given.")
    score_text = _of_plan("score_text", "", "Another text that its score was measured on.")

    def mean(self, metric: str) -> float | None:
        """Over the seeds; None where any record lacks it."""
        values = [record.metrics.get(metric) for record in self.records]
        return None if None in values else float(np.mean(values))  # pyright: ignore

    @property
    def bytes_of_native(self) -> float:
        """Bytes of all experts over native's."""
        return (self.mean("stored_bytes") or 0) / (self.mean("native_bytes") or 1)

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
    """What a study found on one evaluation text: its plans, and the trials that are absent.

    Plans are kept by plan and calibration text. `scored` has, by plan, records of problems alone,
    without windows.
    """

    study: Study
    evaluation_text: str
    by_plan: Mapping[tuple[object, str], Averaged]
    n_absent: int
    scored: Mapping[object, Record] = field(default_factory=dict)

    @property
    def plans(self) -> list[Averaged]:
        """All of them."""
        return list(self.by_plan.values())

    def plans_of(self, kind: type, text: str | None = None) -> list[Averaged]:
        """Plans of one kind, calibrated on `text` or on any."""
        return [p for p in self.plans if isinstance(p.plan, kind) and text in (None, p.text)]

    @property
    def model(self) -> str:
        """Name of the model file; empty for the reference model."""
        asked = self.plans[0].records[0].asked
        return PurePath(asked.inputs.model).stem if isinstance(asked, QualityTrial) else ""

    @property
    def is_dense(self) -> bool:
        """Whether every expert serves every token."""
        found = self.plans[0].records[0].metrics
        n_experts, uses = found.get("experts") or 0, found.get("selections") or 0
        return uses >= n_experts * (found.get("evaluation_tokens") or 0)

    @property
    def text_name(self) -> str:
        """The evaluation text in words."""
        return self.evaluation_text or "source code"

    @cached_property
    def own_text(self) -> str:
        """The calibration text of most plans."""
        texts = [p.text for p in self.plans if not isinstance(p.plan, Native)]
        return max(texts, key=texts.count, default="")

    @cached_property
    def uniform(self) -> list[Averaged]:
        """All matrices in one low format, encoded straight from native by the study's own text."""
        plans = self.plans_of(Uniform, self.own_text)
        return [p for p in plans if not p.through and not p.roles]

    @cached_property
    def whole(self) -> dict[str, Any]:
        """What mixes of the main study have in common; `ablation` varies it."""
        every = max((p.formats for p in self.plans), key=len)
        return {"formats": every, "encoder": BEST_ENCODER, "score_text": ""}

    @cached_property
    def mixed(self) -> list[Averaged]:
        """Mixes of the main study, on its own text."""
        plans = self.plans_of(MixedInBytes, self.own_text)
        found = [p for p in plans if replace(p.plan, **self.whole) == p.plan]
        last = len(_SCORES)
        rank = {score: n for n, score in enumerate(_SCORES)} | {RANDOM: last + 1}
        return sorted(found, key=lambda p: (p.limit or 0, rank.get(p.score, last)))

    def like(self, averaged: Averaged, text: str | None = None, **changes: Any) -> Averaged | None:
        """The plan that differs from another in these fields, or in its text, and in nothing."""
        text = averaged.text if text is None else text
        return self.by_plan.get((replace(averaged.plan, **changes), text))

    def difference(self, left: Averaged | None, right: Averaged | None) -> Interval | None:
        """KL of `left` less that of `right`, in pairs; None without both or a seed in common.

        A plan that no seed enters (native, rtn) pairs with every seed of the other.
        """
        if left is None or right is None or left is right:
            return None
        pairs = _paired(left, right)
        return None if pairs is None else interval(pairs[0] - pairs[1])

    def best_of_ggml(self, averaged: Averaged) -> Averaged | None:
        """ggml's uniform quant of least KL among those of at most a plan's bytes."""
        most = averaged.bytes_of_native * (1 + 1e-9)
        rivals = [p for p in self.uniform if p.encoder == "ggml" and p.bytes_of_native <= most]
        return min(rivals, key=lambda p: p.kl.value, default=None)

    def over_ggml(self, averaged: Averaged) -> Interval | None:
        """KL of a plan over that of `best_of_ggml`, windows resampled in pairs; of ggml's, None."""
        rival = self.best_of_ggml(averaged)
        if rival is None or averaged.encoder == "ggml" or isinstance(averaged.plan, Native):
            return None
        pairs = _paired(averaged, rival)
        if pairs is None:
            return None
        own_W, rival_W = (kl_SW.mean(axis=0) for kl_SW in pairs)
        return bootstrap(lambda i: own_W[i].mean() / rival_W[i].mean(), len(own_W))

    def line(self, averaged: Averaged) -> Averaged | None:
        """The uniform plans of the best encoder at the bytes of a plan, straight between them.

        KL in each window is interpolated between the two neighbours; native's is 0.
        """
        uniform = [
            other
            for other in self.plans_of(Uniform, averaged.text)
            if other.encoder == BEST_ENCODER and not other.through and not other.roles
        ]
        seeds = tuple(s for s in averaged.seeds if all(s in other.seeds for other in uniform))
        if not uniform or not seeds:
            return None
        points = [(p.bytes_of_native, p.at_seeds(seeds)) for p in uniform]
        native = (1.0, np.zeros_like(points[0][1]))
        kl_SW = line_at(averaged.bytes_of_native, undominated([native, *points]))
        return None if kl_SW is None else replace(averaged, kl_SW=kl_SW, seeds=seeds)

    def bytes_read(self, averaged: Averaged) -> float | None:
        """Bytes that one use of an expert reads, over native's."""
        metric = "bytes_read_per_selection"
        own, native = averaged.mean(metric), [p.mean(metric) for p in self.plans_of(Native)]
        return own / native[0] if own and native and native[0] else None


def frontiers(study: Study, found: Records) -> list[Frontier]:
    """The study that `study` describes, on each of its evaluation texts.

    Raises:
        ValueError: no finished record of a text.
    """
    done = found.finished(study)
    groups: dict[str, dict[tuple[Any, str], dict[int, Record]]] = {}
    scored: dict[str, dict[object, Record]] = defaultdict(dict)
    for record in done:
        asked = record.asked
        if isinstance(asked, QualityTrial) and not asked.sizes.windows:
            scored[asked.inputs.evaluation_text][asked.plan] = record
        elif isinstance(asked, QualityTrial):
            key = asked.plan, asked.inputs.calibration_text
            plans = groups.setdefault(asked.inputs.evaluation_text, {})
            plans.setdefault(key, {})[asked.seed] = record
    if not groups:
        some = "finished records of problems alone, none of a text" if scored else "no record"
        raise ValueError(f"the study {study.name} has {some}; run all of the sweep first")

    def averaged(plan: Any, text: str, by_seed: Mapping[int, Record]) -> Averaged:
        seeds, records = zip(*sorted(by_seed.items()), strict=True)
        kl_SW = np.array([r.samples["kl_nats_W"] for r in records])
        return Averaged(plan, text, seeds, kl_SW, records)

    n_absent, on_texts = len(study.trials) - len(done), []
    for text, plans in groups.items():
        by_plan = {key: averaged(*key, by_seed) for key, by_seed in plans.items()}
        on_texts.append(Frontier(study, text, by_plan, n_absent, scored[text]))
    return on_texts


def _paired(left: Averaged, right: Averaged) -> tuple[np.ndarray, np.ndarray] | None:
    """Both [seeds, windows] at the seeds that they share; one without seeds pairs with all."""
    if any(p.encoder == "rtn" and isinstance(p.plan, Native | Uniform) for p in (left, right)):
        left_SW, right_SW = np.broadcast_arrays(left.kl_SW, right.kl_SW)
        return left_SW, right_SW
    common = [seed for seed in left.seeds if seed in right.seeds]
    if not common:
        return None
    return left.at_seeds(common), right.at_seeds(common)
