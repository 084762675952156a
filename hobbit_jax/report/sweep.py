"""A sweep of the cache as found: its records by plan and budget, and those that are absent.

Owns how plans are named, ordered and paired with their rivals and controls.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath

import numpy as np

from hobbit_jax.record import (
    CacheTrial,
    MissModeTrial,
    Mixed,
    Native,
    Record,
    Records,
    Study,
    Uniform,
)
from hobbit_jax.report.paired import kl_nats_W, points, undominated
from hobbit_jax.report.table import percent

RANDOM = "random"
_SCORES = ("router_weight", "frequency", "accumulated_weight", "sensitivity")
_KINDS = (Native, Uniform, MissModeTrial, Mixed)
_GPU_PLATFORMS = ("gpu", "cuda", "rocm")  # as JAX calls them


def trial(record: Record) -> CacheTrial:
    """What a record of the sweep was asked."""
    assert isinstance(record.asked, CacheTrial)
    return record.asked


def on_gpu(record: Record) -> bool:
    """Whether it was measured on a GPU."""
    return (record.device or "").partition(":")[0] in _GPU_PLATFORMS


def low_format(record: Record) -> str:
    """The format of demoted experts; empty natively."""
    return getattr(trial(record).plan, "format", "")


def is_control(record: Record) -> bool:
    """Whether experts were demoted at random."""
    return getattr(trial(record).plan, "score", None) == RANDOM


def is_candidate(record: Record) -> bool:
    """Whether it mixes precisions by something better than chance."""
    return isinstance(trial(record).plan, Mixed | MissModeTrial) and not is_control(record)


def at(record: Record) -> str:
    """The budget in words."""
    return f"{trial(record).budget_mib:g} MiB"


def pool_share(plan: MissModeTrial) -> str:
    """The low copies' part of the pool in words."""
    if plan.share == "adaptive":
        return "the pool divided by use"
    return f"{percent(plan.share)} of the pool"


def task_names(record: Record) -> list[str]:
    """Metrics of a record that are shares of problems solved."""
    return [n.removesuffix("_problems") for n in record.metrics if n.endswith("_problems")]


def scored_tasks(records: Iterable[Record]) -> list[str]:
    """Names of the tasks that any record has a score of."""
    names = {name for record in records for name in task_names(record)}
    return sorted(name.removeprefix("task_") for name in names)


def order(record: Record) -> tuple:
    """Sort key: native, uniform, miss modes, scores, the random control last; then the budget."""
    asked = trial(record)
    plan = asked.plan
    score = getattr(plan, "score", getattr(plan, "mode", ""))
    rank = _SCORES.index(score) if score in _SCORES else len(_SCORES) + (score == RANDOM)
    share = getattr(plan, "share", 0)
    share = math.inf if share == "adaptive" else share
    return (
        _KINDS.index(type(plan)), rank, score, low_format(record), share, asked.seed,
        asked.budget_mib,
    )  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """Records of one study that finished, in the order of `order`, and what is absent.

    `records` are those of one cache policy, and the answers go by them. The policy is the usual
    one, or the first of a sweep without it by name. `other_policies` differ in that alone.
    """

    study: Study
    records: tuple[Record, ...]
    failed: tuple[Record, ...]
    missing: tuple[str, ...]
    foreign: tuple[str, ...]
    other_policies: tuple[Record, ...] = ()

    @classmethod
    def of(cls, study: Study, found: Records) -> "Sweep":
        """The sweep that `study` describes."""
        wanted = set(study.trials)
        own = {r.name: r for r in found.of(study.name) if isinstance(r.asked, CacheTrial)}
        asked = [record for name, record in own.items() if name in wanted]
        done = sorted((r for r in asked if r.status == "ok"), key=order)
        policies = {trial(record).policy for record in done}
        usual = CacheTrial.policy if CacheTrial.policy in policies else min(policies, default="")
        return cls(
            study,
            tuple(r for r in done if trial(r).policy == usual),
            tuple(r for r in asked if r.status == "failed"),
            tuple(sorted(wanted - own.keys())),
            tuple(sorted(own.keys() - wanted)),
            tuple(r for r in done if trial(r).policy != usual),
        )

    @property
    def n_absent(self) -> int:
        """Number of trials without a record that can be read; 0 of a finished sweep."""
        return len(self.missing)

    @property
    def model(self) -> str:
        """The name of the model."""
        path = trial((*self.records, *self.failed)[0]).inputs.model
        return PurePath(path).stem or "the reference model"

    @property
    def native_bytes(self) -> int:
        """Of all experts at the model's own precision; 0 without a record."""
        return max((int(r.metrics.get("native_bytes") or 0) for r in self.records), default=0)

    @property
    def gpu_records(self) -> list[Record]:
        """Those that were measured on a GPU."""
        return list(filter(on_gpu, self.records))

    @cached_property
    def budgets(self) -> list[float]:
        """Pool budgets in MiB."""
        return sorted({trial(record).budget_mib for record in self.records})

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the scored tasks."""
        return scored_tasks(self.records)

    @cached_property
    def control_seeds(self) -> list[int]:
        """Of the draws of the random control."""
        return sorted({trial(record).seed for record in self.records if is_control(record)})

    def span(self, metric: str) -> str:
        """The least and the largest value above 0 of a metric: `4`, or `4 to 48`."""
        values = sorted({r.metrics.get(metric) or 0 for r in self.records} - {0}) or [0]
        return " to ".join(map(str, dict.fromkeys([values[0], values[-1]])))

    def beside(self, record: Record) -> list[Record]:
        """Records at the same budget and policy, with the same inputs and sizes."""
        here = trial(record)
        same = {"plan": here.plan, "seed": here.seed}
        return [other for other in self.records if replace(trial(other), **same) == here]

    def native(self, record: Record) -> Record | None:
        """The native record beside `record`."""
        return next((r for r in self.beside(record) if isinstance(trial(r).plan, Native)), None)

    def over_native(self, record: Record, metric: str) -> float | None:
        """A metric over native's beside it; None where either is absent or native's is 0."""
        native, own = self.native(record), record.metrics.get(metric)
        base = native.metrics.get(metric) if native else None
        return own / base if own is not None and base else None

    def uniform(self, record: Record) -> list[Record]:
        """Records of one precision below native, beside `record`."""
        return [r for r in self.beside(record) if isinstance(trial(r).plan, Uniform)]

    def draws(self, record: Record) -> list[Record]:
        """The random control of a plan: draws in its format, a record a seed and share.

        They may stand at another budget, since what a static plan loses does not depend on it.
        """
        here = trial(record)
        same = {"plan": here.plan, "seed": here.seed, "budget_mib": here.budget_mib}
        return [
            drawn
            for drawn in filter(is_control, self.per_plan())
            if low_format(drawn) == low_format(record) and replace(trial(drawn), **same) == here
        ]

    def per_plan(self) -> list[Record]:
        """One record a plan, since quality does not depend on the budget; of a miss mode, each."""
        found: dict[object, Record] = {}
        for record in self.records:
            asked = trial(record)
            by_miss = isinstance(asked.plan, MissModeTrial)
            key = record.name if by_miss else (asked.plan, asked.seed, asked.inputs)
            if kl_nats_W(record) is not None:
                found.setdefault(key, record)
        return list(found.values())

    def candidates(self) -> list[Record]:
        """Those of `per_plan` that may be worth it."""
        return list(filter(is_candidate, self.per_plan()))

    def label(self, record: Record) -> str:
        """A short name; the seed is said only where the sweep has several."""
        asked = trial(record)
        plan = asked.plan
        if isinstance(plan, Native):
            return "native"
        if isinstance(plan, Uniform):
            return f"uniform {plan.format}"
        if isinstance(plan, MissModeTrial):
            return f"{plan.mode} {plan.format}, {pool_share(plan)}"
        seeds = {trial(r).seed for r in self.records if trial(r).plan == plan}
        seed = f" (seed {asked.seed})" if len(seeds) > 1 else ""
        return f"{plan.score} {percent(plan.share)} {plan.format}{seed}"

    def envelope(self, record: Record) -> list[tuple[float, np.ndarray]]:
        """(bytes moved a token, KL of windows) of native and the uniform quants beside `record`."""
        rivals = filter(None, (self.native(record), *self.uniform(record)))
        return undominated(points(rivals, lambda r: r.metrics.get("bytes_moved_per_token")))
