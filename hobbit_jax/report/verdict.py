"""The rule that turns rows into an answer.

Owns what "worth it" means. The limits are the config's (`sweep.json`, written before any row);
nothing here can move them. What was not measured makes a clause open, never true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from hobbit_jax.report.comparisons import ZERO, above, compare_speed, control_gap
from hobbit_jax.report.results import MIB, NATIVE, RANDOM, UNIFORM, Plan, Results, Row, Setting

_ROUNDING = 1e-9  # of a difference of two shares, so that a loss of exactly the limit passes
BYTES_MOVED = "bytes moved"


@dataclass(frozen=True)
class Rule:
    """The limits stated beforehand; units in the names, `kl_limit` in nats per token."""

    kl_limit: float
    speedup_needed: float
    bytes_moved_ratio_needed: float
    task_loss_limit: float
    pcie_gb_s: float
    device_gb_s: float
    card: str

    @classmethod
    def of(cls, rule: Mapping[str, Any]) -> Rule:
        """Reads the rule of a sweep.

        Raises:
            ValueError: a limit is absent or no number.
        """
        values = {}
        for field in fields(cls):
            value = rule.get(field.name)
            wanted = str if field.name == "card" else int | float
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise ValueError(f"the sweep's rule has {field.name} = {value!r}; want a value")
            values[field.name] = value
        return cls(**values)


class Outcome(Enum):
    """The answers, best first."""

    WORTH_IT = "worth it"
    SMALLER_EXPERTS = "the smaller experts pay, the signal does not"
    NOT_NEEDED = "not needed at this budget"
    OPEN = "open"
    NO = "not worth it"


@dataclass(frozen=True)
class Condition:
    """One clause of the rule. `holds` is None where the rows cannot say.

    A skipped clause does not count: it says why in `text`.
    """

    name: str
    holds: bool | None
    text: str
    skipped: bool = False

    @property
    def mark(self) -> str:
        """For a table cell."""
        if self.skipped:
            return "skipped"
        return {True: "holds", False: "fails", None: "open"}[self.holds]


@dataclass(frozen=True)
class Judgement:
    """The rule applied to one mixed plan at one budget."""

    row: Row
    outcome: Outcome
    conditions: tuple[Condition, ...]

    @property
    def decisive(self) -> list[Condition]:
        """The clauses that decided: all that failed, else all that are open, else all."""
        if self.outcome is Outcome.NOT_NEEDED:
            return [c for c in self.conditions if c.name == BYTES_MOVED]
        counted = [c for c in self.conditions if not c.skipped]
        for verdict in (False, None):
            found = [c for c in counted if c.holds is verdict]
            if found:
                return found
        return counted


@dataclass(frozen=True)
class Verdict:
    """The answer for one budget and low format: its best candidate, and all of them.

    `simpler` are the uniform plans that keep the same limits of KL, tasks and bytes moved at
    this budget. The rule lets a mixed plan win beside them if it is nearer to native.
    """

    setting: Setting
    low_format: str
    best: Judgement
    judgements: tuple[Judgement, ...]
    simpler: tuple[Plan, ...]


def verdicts(results: Results, rule: Rule) -> list[Verdict]:
    """One verdict for each (budget, low format) that has a mixed plan."""
    groups: dict[tuple[Setting, str], list[Judgement]] = {}
    for row in results.rows:
        if row.plan.is_mixed:
            judgement = judge(row, results, rule)
            groups.setdefault((row.setting, row.plan.low_format or ""), []).append(judgement)
    found = []
    for (setting, low_format), group in sorted(groups.items()):
        simpler = tuple(
            row.plan
            for row in results.rows
            if row.setting == setting
            and row.plan.signal == UNIFORM
            and _keeps_limits(row, results.native(row), rule)
        )
        best = min(group, key=_preference)
        found.append(Verdict(setting, low_format, best, tuple(group), simpler))
    return found


def judge(row: Row, results: Results, rule: Rule) -> Judgement:
    """Applies `rule` to a mixed plan at its budget."""
    native = results.native(row)
    conditions = [
        _quality(row, rule),
        _tasks(row, native, rule),
        _bytes_moved(row, native, rule),
        _rivals(row, results),
        _signal(row, results),
        _speed(row, native, rule),
    ]
    counted = {c.name: c.holds for c in conditions if not c.skipped}
    signal = counted.pop("signal")
    if native is not None and native.bytes_moved == 0:
        outcome = Outcome.NOT_NEEDED
    elif False in counted.values():
        outcome = Outcome.NO
    elif None in counted.values():
        outcome = Outcome.OPEN
    else:
        decided = {True: Outcome.WORTH_IT, False: Outcome.SMALLER_EXPERTS, None: Outcome.OPEN}
        outcome = decided[signal]
    return Judgement(row, outcome, tuple(conditions))


def _keeps_limits(row: Row, native: Row | None, rule: Rule) -> bool:
    clauses = (_quality(row, rule), _tasks(row, native, rule), _bytes_moved(row, native, rule))
    return all(clause.holds or clause.skipped for clause in clauses)


def _preference(judgement: Judgement) -> tuple:
    """Sort key: the outcome, few failed clauses, no control, few bytes moved, low KL."""
    row, kl = judgement.row, judgement.row.kl_mean
    return (
        list(Outcome).index(judgement.outcome),
        sum(c.holds is False for c in judgement.conditions if not c.skipped),
        row.plan.signal == RANDOM,
        float("inf") if row.bytes_moved is None else row.bytes_moved,
        kl.value if kl else float("inf"),
        row.plan.order,
    )


def _quality(row: Row, rule: Rule) -> Condition:
    kl = row.kl_mean
    if kl is None:
        return Condition("KL", None, "KL was not measured")
    holds = kl.high <= rule.kl_limit
    relation = "within" if holds else "above"
    text = f"KL {kl.value:.4f}, upper end {kl.high:.4f}, is {relation} the limit {rule.kl_limit:g}"
    return Condition("KL", holds, text)


def _tasks(row: Row, native: Row | None, rule: Rule) -> Condition:
    rival = native.tasks if native else {}
    falls = {
        name: rival[name].score.value - task.score.value
        for name, task in row.tasks.items()
        if name in rival
    }
    if not falls:
        return Condition("tasks", None, "task scores are absent: this clause was skipped", True)
    worst = max(falls, key=lambda name: falls[name])
    holds = falls[worst] <= rule.task_loss_limit + _ROUNDING
    change = f"falls by {falls[worst]:.3f}" if falls[worst] > 0 else "does not fall"
    text = f"{worst} {change} against native (limit {rule.task_loss_limit:g})"
    if falls[worst] > 0 and not above(rival[worst].score, row.tasks[worst].score):
        problems = row.tasks[worst].problems
        text += f", intervals overlap on {'unknown' if problems is None else problems} problems"
    return Condition("tasks", holds, text)


def _bytes_moved(row: Row, native: Row | None, rule: Rule) -> Condition:
    rival = native.bytes_moved if native else None
    if row.bytes_moved is None or rival is None:
        return Condition(BYTES_MOVED, None, "bytes moved are unknown for this plan or for native")
    if rival == 0:
        return Condition(BYTES_MOVED, False, "native experts move no bytes: all of them fit")
    ratio = row.bytes_moved / rival
    text = (
        f"moves {row.bytes_moved / MIB:.3f} MiB a token, native {rival / MIB:.3f}: "
        f"×{ratio:.2f}, needed ×{rule.bytes_moved_ratio_needed:g} or less"
    )
    return Condition(BYTES_MOVED, ratio <= rule.bytes_moved_ratio_needed, text)


def _rivals(row: Row, results: Results) -> Condition:
    """No plan of one precision is as small, as close to native and moves as little."""
    absent = {cell.plan for cell in results.failed if cell.plan}
    rivals = {plan for plan in (*results.plans, *absent) if not plan.is_mixed}
    rivals = {plan for plan in rivals if plan.model == row.plan.model}
    if not any(plan.signal == UNIFORM for plan in rivals):
        return Condition("rivals", None, "no uniform rival was measured")
    unsure = []
    for plan in sorted(rivals, key=lambda plan: plan.order):
        verdict, text = _dominates(plan, row, results)
        if verdict:
            return Condition("rivals", False, text)
        if verdict is None:
            unsure.append(results.label(plan))
    if unsure:
        return Condition("rivals", None, f"cannot be compared with {', '.join(unsure)}")
    return Condition("rivals", True, "no plan of one precision is as good at as few bytes")


def _dominates(plan: Plan, row: Row, results: Results) -> tuple[bool | None, str]:
    """Whether `plan` is at least as good as `row` in host bytes, KL and bytes moved.

    One measured disadvantage settles it; otherwise a missing figure leaves it open.
    """
    known = results.quality_row(plan)
    there = results.at(plan, row.setting)
    kl = ZERO if plan.signal == NATIVE else known.kl_mean if known else None
    size = known.plan_bytes if known else None
    moved = there.bytes_moved if there else None
    checks = [
        None if size is None or row.plan_bytes is None else size <= row.plan_bytes,
        None if kl is None or row.kl_mean is None else not above(kl, row.kl_mean),
        None if moved is None or row.bytes_moved is None else moved <= row.bytes_moved,
    ]
    if False in checks:
        return False, ""
    if size is None or kl is None or moved is None or None in checks:
        return None, ""
    return True, (
        f"{results.label(plan)} is as good or better: {size / MIB:.2f} MiB in all, "
        f"KL {kl.value:.4f}, {moved / MIB:.3f} MiB moved a token"
    )


def _signal(row: Row, results: Results) -> Condition:
    gap = control_gap(row.plan, results)
    if row.plan.signal == RANDOM:
        return Condition("signal", False, "this plan is the random control itself")
    if gap is None:
        return Condition("signal", None, "no random control at this share and format")
    what = "the random control"
    if row.plan.residency:
        what = "a random choice of as many uses"
    place = {
        "below": f"below {what}, intervals apart",
        "above": f"above {what}, intervals apart",
        "not separate": f"not separate from {what}",
    }[gap.relation]
    text = f"KL is {place} ({gap.difference:+.4f})"
    return Condition("signal", gap.relation == "below", text)


def _speed(row: Row, native: Row | None, rule: Rule) -> Condition:
    if not row.on_gpu:
        reason = "decode speed was not measured on a GPU: not part of the rule"
        return Condition("speed", None, reason, True)
    relation = compare_speed(row, native) if native else None
    if relation is None or native is None:
        return Condition("speed", None, "decode speed has no comparable native timing")
    assert row.decode and row.decode.tokens_per_second  # compare_speed has seen both
    assert native.decode and native.decode.tokens_per_second
    ratio = row.decode.tokens_per_second.value / native.decode.tokens_per_second.value
    holds = relation == "faster" and ratio >= rule.speedup_needed
    text = f"decodes ×{ratio:.2f} as fast as native, needed ×{rule.speedup_needed:g}"
    return Condition("speed", holds, text + (" (equal within the spread)" * (relation == "equal")))
