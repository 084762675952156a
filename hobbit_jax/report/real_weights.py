"""The study of real weights: plans that were scored on several texts, each beside its rivals.

Owns what is compared there. A plan's KL is a mean over windows of a text; the ratio of two plans is
of their means over the same windows of all texts, with a 95 % interval by resampling windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hobbit_jax.record import Native, QualityTrial, Record, Uniform
from hobbit_jax.report.paired import kl_nats_W
from hobbit_jax.report.table import Column, percent, table
from hobbit_jax.statistics import Interval, bootstrap

STUDY = "real_weights"
TEXTS = {"": "code", "wikitext": "prose", "gsm8k": "problems"}


@dataclass(frozen=True)
class ScoredPlan:
    """One plan and its record on each text."""

    plan: Native | Uniform
    records: dict[str, Record]

    @property
    def name(self) -> str:
        """What is encoded and how."""
        if isinstance(self.plan, Native):
            return "native"
        words = [*self.plan.through, f"{self.plan.format}, {self.plan.encoder}"]
        roles = f" ({' and '.join(self.plan.roles)} only)" if self.plan.roles else ""
        return " → ".join(words) + roles

    @property
    def bytes_of_native(self) -> float:
        """Bytes of the feed-forward matrices over native's."""
        metrics = next(iter(self.records.values())).metrics
        return float(metrics["stored_bytes"] or 0) / float(metrics["native_bytes"] or 1)

    @cached_property
    def kl_W(self) -> np.ndarray:
        """Mean KL of each window of all texts, in their order."""
        found = [kl_nats_W(record) for record in self.records.values()]
        return np.concatenate([kl for kl in found if kl is not None])


def scored_plans(records: Iterable[Record]) -> list[ScoredPlan]:
    """The study's plans that were measured on every text that any plan was measured on."""
    by_plan: dict[Native | Uniform, dict[str, Record]] = {}
    for record in records:
        if record.status == "ok" and isinstance(record.asked, QualityTrial):
            assert isinstance(record.asked.plan, Native | Uniform)
            texts = by_plan.setdefault(record.asked.plan, {})
            texts[record.asked.inputs.evaluation_text] = record
    texts = max((list(found) for found in by_plan.values()), key=len, default=[])
    texts.sort(key=list(TEXTS).index)
    return [
        ScoredPlan(plan, {text: found[text] for text in texts})
        for plan, found in by_plan.items()
        if found.keys() == set(texts)
    ]


def best_of_ggml(plan: ScoredPlan, plans: Iterable[ScoredPlan]) -> ScoredPlan | None:
    """The plan by ggml's encoder with least KL of those that take at most as many bytes."""
    rivals = [
        other
        for other in plans
        if isinstance(other.plan, Uniform)
        and other.plan.encoder == "ggml"
        and other.bytes_of_native <= plan.bytes_of_native
    ]
    return min(rivals, key=lambda other: other.kl_W.mean(), default=None)


def kl_ratio(plan: ScoredPlan, other: ScoredPlan) -> Interval:
    """KL of `plan` over that of `other`, on the same windows."""
    left_W, right_W = plan.kl_W, other.kl_W
    return bootstrap(lambda w: left_W[w].mean() / right_W[w].mean(), len(left_W))


def losses(plans: list[ScoredPlan]) -> str:
    """KL by text, top-1 agreement and perplexity of each plan, largest first."""

    def of_text(text: str, metric: str):
        return lambda plan: plan.records[text].interval(metric)

    def mean(metric: str):
        return lambda p: float(np.mean([r.metrics[metric] for r in p.records.values()]))

    texts = list(plans[0].records) if plans else []
    columns = [
        Column("feed-forward matrices", "name"),
        Column("bytes, of native", lambda plan: percent(round(plan.bytes_of_native, 3))),
        *(Column(f"KL, {TEXTS[text]}", of_text(text, "kl_mean_nats"), ".4f") for text in texts),
        Column("top-1", mean("top1_agreement"), ".3f"),
        *(Column(f"perplexity, {TEXTS[t]}", of_text(t, "perplexity"), ".2f") for t in texts),
    ]
    return table(columns, sorted(plans, key=lambda p: (-p.bytes_of_native, p.kl_W.mean())))


def against_ggml(plans: list[ScoredPlan]) -> str:
    """Each encoder of ours against the best type of ggml of at most equal bytes."""

    def rival(plan: ScoredPlan) -> str | None:
        found = best_of_ggml(plan, plans)
        return found and found.name

    def of_rival(plan: ScoredPlan) -> Interval | None:
        found = best_of_ggml(plan, plans)
        return found and kl_ratio(plan, found)

    ours = [
        plan
        for plan in plans
        if isinstance(plan.plan, Uniform)
        and plan.plan.encoder != "ggml"
        and not (plan.plan.roles or plan.plan.through)
    ]
    columns = [
        Column("feed-forward matrices", "name"),
        Column("best of ggml", rival),
        Column("KL, of its", of_rival, ".2f"),
    ]
    return table(columns, ours)
