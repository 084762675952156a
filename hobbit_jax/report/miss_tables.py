"""The study of ways to serve a miss: what each costs at equal pool bytes, and what it loses.

Owns the cost of a way on a link of a given slowness, the cheapest way of a plan, and whether a way
that mixes precisions, or routes around misses, beats native and the uniform quants at its own cost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hobbit_jax.record import CacheTrial, MissModeTrial, Native, Record, Records, Study, Uniform
from hobbit_jax.report import paired
from hobbit_jax.report.sweep import at, order, pool_share, trial
from hobbit_jax.report.table import MIB, Column, ratio, table
from hobbit_jax.statistics import Interval

# Times as long that a link takes for a byte as the CPU.
LINK_RATIOS = (1, 4, 16)
_WAYS = {"fetch": "fetched", "host": "computed", "hybrid": "divided"}


def _cost(record: Record, link: int) -> Interval | None:
    """MiB that the CPU reads while the busier of link and CPU is busy for a token, over prompts.

    The link takes `link` times as long for a byte. None for a mode that divides misses for
    another link.
    """
    asked = trial(record)
    if asked.misses == "hybrid" and not math.isclose(asked.link_to_host * link, 1):
        return None
    moved_R, computed_R = (
        np.asarray(record.samples[f"bytes_{name}_per_token_R"]) for name in ("moved", "computed")
    )
    return paired.mean_interval(np.maximum(moved_R * link, computed_R) / MIB)


def _is_native_fetched(record: Record) -> bool:
    """Whether it is what all ways are compared with."""
    asked = trial(record)
    return asked.plan == Native() and asked.misses == CacheTrial.misses and not asked.by_decoding


def label(record: Record) -> str:
    """Who has which precision, and what serves a miss."""
    asked = trial(record)
    plan = asked.plan
    if isinstance(plan, MissModeTrial):
        share = f", {pool_share(plan)}" if plan.share else ""
        return f"{plan.mode} with {plan.format}{share}"
    name = f"uniform {plan.format}" if isinstance(plan, Uniform) else "native"
    lift = f", routed toward residents by {asked.resident_lift:g}" if asked.resident_lift else ""
    return f"{name}{lift}, {_WAYS.get(asked.misses, asked.misses)}"


@dataclass(frozen=True)
class Mix:
    """A way that loses something token by token, against native and the uniform quants.

    `gap` is its KL less that of the straight line through them at its cost, each served in its
    cheapest way, with an interval that is corrected for the number of mixes. A mix that costs more
    than all of them is against the dearest, which is native; `gap` is None where it costs less.
    """

    record: Record
    cost: Interval
    gap: Interval | None

    @property
    def relation(self) -> str | None:
        """To the line: "below", "above" or "not told apart"."""
        return paired.relation(self.gap)


@dataclass(frozen=True)
class Cell:
    """One pool and one link."""

    budget_mib: float
    link: int
    records: tuple[Record, ...]

    def ways(self, plan: object) -> list[Record]:
        """Of a plan that loses the same whatever serves its misses, the cheapest first."""
        own = [r for r in self.records if trial(r).plan == plan and not trial(r).by_decoding]
        known = [(cost.value, r) for r in own if (cost := self.cost(r))]
        return [record for _, record in sorted(known, key=lambda pair: pair[0])]

    def cost(self, record: Record) -> Interval | None:
        """MiB of the CPU's reads, with its interval over prompts."""
        return _cost(record, self.link)

    @cached_property
    def mixes(self) -> list[Mix]:
        """The others, those with the least KL against the line first."""
        cheapest = [
            way for plan in {trial(r).plan for r in self.records} for way in self.ways(plan)[:1]
        ]
        rivals = paired.points(cheapest, lambda r: cost.value if (cost := self.cost(r)) else None)
        line = paired.undominated(rivals)
        most = max((place for place, _ in line), default=0.0)
        others = [r for r in self.records if trial(r).by_decoding]
        found = []
        for record in others:
            cost, kl_W = self.cost(record), paired.kl_nats_W(record)
            if cost is not None and kl_W is not None:
                line_W = paired.line_at(min(cost.value, most), line)
                confidence = 1 - 0.05 / len(others)
                gap = None if line_W is None else paired.difference(kl_W, line_W, confidence)
                found.append(Mix(record, cost, gap))
        return sorted(found, key=lambda mix: mix.gap.value if mix.gap else math.inf)

    @property
    def all_above(self) -> bool:
        """Whether every mix that the line reaches has more KL than it."""
        return {mix.relation for mix in self.mixes} - {None} == {"above"}


@dataclass(frozen=True)
class MissStudy:
    """Records of the study that finished, and how many trials did not."""

    study: Study
    records: tuple[Record, ...]
    n_absent: int

    @classmethod
    def of(cls, study: Study, found: Records) -> "MissStudy":
        """The study that `study` describes."""
        done = [r for r in found.finished(study) if isinstance(r.asked, CacheTrial)]
        return cls(study, tuple(sorted(done, key=_order)), len(study.trials) - len(done))

    @cached_property
    def cells(self) -> list[Cell]:
        """Every pool with every link."""
        budgets = sorted({trial(r).budget_mib for r in self.records})
        groups = {b: tuple(r for r in self.records if trial(r).budget_mib == b) for b in budgets}
        return [Cell(b, link, records) for b, records in groups.items() for link in LINK_RATIOS]

    @cached_property
    def plans(self) -> list[Native | Uniform]:
        """Native and the uniform quants, the nearest to native first."""
        plans = dict.fromkeys(trial(r).plan for r in self.records if not trial(r).by_decoding)
        return [plan for plan in plans if isinstance(plan, Native | Uniform)]

    def count(self, wanted: str) -> int:
        """Cells with at least one mix that has this `relation` to the line."""
        return sum(any(mix.relation == wanted for mix in cell.mixes) for cell in self.cells)


def small_low_bank(study: MissStudy | None) -> list[str]:
    """HOBBIT whose low bank moves least: bytes over those of native, fetched, and KL, by pool."""
    groups: dict[float, dict[str, Record]] = {}
    for record in study.records if study else ():
        here = groups.setdefault(trial(record).budget_mib, {})
        if _is_native_fetched(record):
            here["native"] = record
        elif getattr(trial(record).plan, "mode", "") == "hobbit":
            here["hobbit"] = min(here.get("hobbit", record), record, key=_moved)
    return [
        f"{ratio(_moved(here['hobbit']) / _moved(here['native']))} at {budget_mib:g} MiB, KL "
        f"{here['hobbit'].metrics['kl_mean_nats']:.4f} ({label(here['hobbit'])})"
        for budget_mib, here in groups.items()
        if len(here) == 2 and _moved(here["native"])
    ]


def _moved(record: Record) -> float:
    return record.metrics["bytes_moved_per_token"] or 0.0


def _order(record: Record) -> tuple:
    asked = trial(record)
    served = list(_WAYS).index(asked.misses) if asked.misses in _WAYS else len(_WAYS)
    return asked.budget_mib, *order(record), asked.resident_lift, served, -asked.link_to_host


def all_ways(study: MissStudy) -> str:
    """A row a pool and way."""

    def per_token(title: str, name: str, form: str, unit: float = 1) -> Column:
        def mean(record: Record) -> Interval:
            return paired.mean_interval(np.asarray(record.samples[f"{name}_per_token_R"]))

        return Column(f"{title} a token", mean, form, unit=unit)

    def link(record: Record) -> float | None:
        return trial(record).link_to_host if trial(record).misses == "hybrid" else None

    columns = [
        Column("pool", at),
        Column("way", label),
        Column("link to CPU", link, "g"),
        Column("KL", "kl_mean_nats", ".4f", interval=True),
        Column("hit rate", "hit_rate", ".2f"),
        per_token("moved, MiB", "bytes_moved", ".3f", MIB),
        per_token("computed, MiB", "bytes_computed", ".3f", MIB),
        per_token("round trips", "host_round_trips", ".2f"),
        *(Column(f"cost at {n}:1", lambda r, n=n: _cost(r, n), ".2f") for n in LINK_RATIOS),
    ]
    return table(columns, study.records)


def cheapest(study: MissStudy) -> str:
    """A row a pool and link: what native costs fetched, every plan at its cheapest, a mix."""

    def served(plan: object) -> Column:
        def least(cell: Cell) -> str | None:
            for record in cell.ways(plan)[:1]:
                cost = cell.cost(record)
                return cost and f"{cost.value:.2f}, {_WAYS[trial(record).misses]}"
            return None

        name = f"uniform {plan.format}" if isinstance(plan, Uniform) else "native"
        return Column(f"{name} at its cheapest", least)

    def fetched(cell: Cell) -> Interval | None:
        return next((cell.cost(r) for r in cell.records if _is_native_fetched(r)), None)

    def of_best(value: Callable[[Mix], Any]) -> Callable[[Cell], Any]:
        return lambda cell: value(cell.mixes[0]) if cell.mixes and cell.mixes[0].gap else None

    columns = [
        Column("pool", lambda cell: f"{cell.budget_mib:g} MiB"),
        Column("link", lambda cell: f"{cell.link}:1"),
        Column("native, fetched", fetched, ".2f"),
        *map(served, study.plans),
        Column("best mix", of_best(lambda mix: label(mix.record))),
        Column("its cost", of_best(lambda mix: mix.cost), ".2f"),
        Column("its KL", of_best(lambda mix: mix.record.metrics["kl_mean_nats"]), ".4f"),
        Column("KL less the line", of_best(lambda mix: mix.gap), "+.4f"),
    ]
    return table(columns, study.cells)
