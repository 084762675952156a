"""What a finished sweep found, as types: its rows, and the cells that are absent.

Owns the seam between the row files (`read_results.py` reads them) and the document: `verdict.py`,
`figures.py` and `document.py` see only these types. A value that was not measured is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hobbit_jax.statistics import Interval

NATIVE, UNIFORM, RANDOM, RESIDENCY = "native", "uniform", "random", "residency"
MIB = 2**20
# The order of every table and legend; a signal not named here comes before the control.
_KNOWN = (NATIVE, UNIFORM, RESIDENCY, "router_weight", "frequency", "accumulated_weight")
_GPU = re.compile(r"nvidia|cuda|gpu|rocm|radeon|geforce|rtx", re.IGNORECASE)
_NO_GPU = re.compile(r"^\W*cpu|\b(no|without)( a| any)? gpu", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Residency:
    """Who goes low when missing: a miss mode, its share of the pool, and the pool."""

    mode: str
    low_share: float
    budget_mib: float


@dataclass(frozen=True)
class Plan:
    """Who goes low: everything that quality depends on.

    `low_fraction` is of pairs or selections; `residency` is None unless that is the signal.
    """

    model: str
    signal: str
    low_format: str | None
    low_fraction: float
    seed: int
    residency: Residency | None = None

    @property
    def is_mixed(self) -> bool:
        """True for every plan that is neither native nor uniformly smaller."""
        return self.signal not in (NATIVE, UNIFORM)

    @property
    def order(self) -> tuple:
        """Sort key: native, uniform, the signals, the random control last."""
        rank = _KNOWN.index(self.signal) if self.signal in _KNOWN else len(_KNOWN)
        rank += self.signal == RANDOM
        low = self.low_format or ""
        residency = self.residency or Residency("", 0.0, 0.0)
        return (self.model, rank, self.signal, low, self.low_fraction, residency, self.seed)


@dataclass(frozen=True, order=True)
class Setting:
    """What a cost is compared at: the same model, pool bytes and cache policy."""

    model: str
    budget_mib: float
    protected_fraction: float


@dataclass(frozen=True)
class Quality:
    """Agreement with the native model on `tokens` held-out tokens; KL in nats."""

    tokens: int | None
    bits_per_byte: Interval | None
    perplexity: Interval | None
    kl_mean: Interval | None
    kl_p99: Interval | None
    top1_agreement: Interval | None


@dataclass(frozen=True)
class Task:
    """Solved share (0-1) of a task's problems."""

    problems: int | None
    correct: int | None
    score: Interval


@dataclass(frozen=True)
class Store:
    """Host bytes of all experts, natively and under the plan."""

    experts: int | None
    native_bytes: float | None
    plan_bytes: float | None


@dataclass(frozen=True)
class Pool:
    """The device slots that the budget bought."""

    budget_bytes: float | None
    device_bytes: float | None
    slots: Mapping[str, int]
    resident_pairs: int | None


@dataclass(frozen=True)
class Decode:
    """Cost of decoding; `tokens_per_second` is median, min and max of the repeats."""

    tokens: int | None
    hit_rate: float | None
    degraded_fraction: float | None
    skipped_fraction: float | None
    exits_per_token: float | None
    bytes_moved_per_token: float | None
    bytes_used_per_token: float | None
    tokens_per_second: Interval | None
    repeats: int


@dataclass(frozen=True)
class Row:
    """One cell that ran. Any part may be None: then it was not measured."""

    cell: str
    plan: Plan
    setting: Setting
    quality: Quality | None
    tasks: Mapping[str, Task]
    store: Store | None
    pool: Pool | None
    decode: Decode | None
    selections_LE: tuple[tuple[int, ...], ...] | None
    provenance: Mapping[str, Any]

    @property
    def device(self) -> str | None:
        """The device that the row says it ran on."""
        return self.provenance.get("device")

    @property
    def on_gpu(self) -> bool:
        """True where the device's name says GPU; an unnamed device counts as none."""
        name = self.device or ""
        return bool(_GPU.search(name)) and not _NO_GPU.search(name)

    @property
    def kl_mean(self) -> Interval | None:
        """Mean KL divergence to the native model, nats."""
        return self.quality.kl_mean if self.quality else None

    @property
    def plan_bytes(self) -> float | None:
        """Host bytes of all experts under the plan."""
        return self.store.plan_bytes if self.store else None

    @property
    def bytes_moved(self) -> float | None:
        """Expert bytes fetched per decoded token."""
        return self.decode.bytes_moved_per_token if self.decode else None


@dataclass(frozen=True)
class Absent:
    """A cell without a usable row, and why."""

    cell: str
    reason: str
    plan: Plan | None = None


@dataclass(frozen=True)
class Results:
    """A sweep as found: `rows` are sorted by plan, budget and cell."""

    title: str
    question: str
    command: str
    config: Mapping[str, Any]
    rule: Mapping[str, Any]
    n_cells: int
    rows: tuple[Row, ...]
    failed: tuple[Absent, ...]
    missing: tuple[Absent, ...]
    unreadable: tuple[Absent, ...]
    unexpected: tuple[str, ...]

    @cached_property
    def plans(self) -> list[Plan]:
        """Every plan with at least one row."""
        return sorted({row.plan for row in self.rows}, key=lambda plan: plan.order)

    @cached_property
    def settings(self) -> list[Setting]:
        """Every (model, budget, policy) with at least one row."""
        return sorted({row.setting for row in self.rows})

    def rows_of(self, plan: Plan) -> list[Row]:
        """All rows of one plan, by budget."""
        return [row for row in self.rows if row.plan == plan]

    def quality_row(self, plan: Plan) -> Row | None:
        """The first row of `plan` that has a KL, else its first row: quality is per plan."""
        rows = self.rows_of(plan)
        return next((row for row in rows if row.kl_mean), rows[0] if rows else None)

    def at(self, plan: Plan, setting: Setting) -> Row | None:
        """The row of `plan` at `setting`, None where there is none."""
        return next((row for row in self.rows_of(plan) if row.setting == setting), None)

    def native(self, row: Row) -> Row | None:
        """The native row to compare `row` with: its setting, if possible its seed."""
        same = [r for r in self.rows if r.plan.signal == NATIVE and r.setting == row.setting]
        return next((r for r in same if r.plan.seed == row.plan.seed), same[0] if same else None)

    def label(self, plan: Plan) -> str:
        """A short name; model and seed are said only where the sweep has several."""
        parts = [plan.residency.mode if plan.residency else plan.signal]
        if plan.is_mixed and not plan.residency:
            parts.append(f"{100 * plan.low_fraction:g} %")
        if plan.low_format:
            parts.append(plan.low_format)
        if plan.residency:
            parts += self._residency_parts(plan.residency)
        siblings = [p for p in self.plans if p.order[:-1] == plan.order[:-1]]
        if len(siblings) > 1:
            parts.append(f"(seed {plan.seed})")
        if len({p.model for p in self.plans}) > 1:
            parts.append(f"[{plan.model}]")
        return " ".join(parts)

    def _residency_parts(self, residency: Residency) -> list[str]:
        """What tells it apart from others of its mode."""
        of_mode = {p.residency for p in self.plans if p.residency}
        of_mode = {r for r in of_mode if r.mode == residency.mode}
        parts = []
        if len({r.low_share for r in of_mode}) > 1:
            parts.append(f"{100 * residency.low_share:g} %")
        if len({r.budget_mib for r in of_mode}) > 1:
            parts.append(f"at {residency.budget_mib:g} MiB")
        return parts

    def setting_label(self, setting: Setting) -> str:
        """The budget in words; model and policy are said only where the sweep has several."""
        text = f"{setting.budget_mib:g} MiB"
        if len({s.protected_fraction for s in self.settings}) > 1:
            text += f", {100 * setting.protected_fraction:g} % protected"
        if len({s.model for s in self.settings}) > 1:
            text += f", {setting.model}"
        return text
