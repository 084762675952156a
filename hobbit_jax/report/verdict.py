"""The rule that turns records into answers.

Owns what "worth it" means. The limits are the config's; nothing here can move them. What the
records cannot settle is open, never yes and never no: a figure that is absent, an interval that
has the limit inside, a trial that is missing or failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum

import numpy as np

from hobbit_jax.record import MissModeTrial, Record
from hobbit_jax.report import paired
from hobbit_jax.report.sweep import Sweep, is_candidate, low_format, on_gpu, order, trial
from hobbit_jax.report.table import MIB, number, ratio
from hobbit_jax.statistics import Interval

BYTES_MOVED, SCORE = "bytes moved", "score"
_ROUNDING = 1e-9  # of a difference of two shares, so that a loss of exactly the limit passes


@dataclass(frozen=True)
class Rule:
    """The limits stated beforehand; units in the names, `kl_limit` in nats a token."""

    kl_limit: float
    speedup_needed: float
    bytes_moved_ratio_needed: float
    task_loss_limit: float

    @classmethod
    def of(cls, rule: Mapping[str, object]) -> Rule:
        """Reads the rule of a sweep.

        Raises:
            ValueError: a limit is absent or no number.
        """
        values = {field.name: rule.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"rule.{name} is {value!r}; want a number in the config's rule")
        return cls(**values)  # pyright: ignore[reportArgumentType]


class Outcome(Enum):
    """The answers of one candidate or of one budget and format, in the order of preference."""

    WORTH_IT = "worth it"
    OPEN = "open"
    AS_RANDOM = "no better than demoting at random"
    NO = "not worth it"
    NOT_NEEDED = "not needed: all native experts fit"


@dataclass(frozen=True)
class Clause:
    """One clause of the rule. `holds` is None where the records cannot say.

    A skipped clause does not count: it says why in `text`.
    """

    name: str
    holds: bool | None
    text: str
    skipped: bool = False

    @property
    def mark(self) -> str:
        """For a table cell."""
        return (
            "skipped" if self.skipped else {True: "holds", False: "fails", None: "open"}[self.holds]
        )


@dataclass(frozen=True)
class Judgement:
    """The rule applied to one plan at one budget.

    `gap` is its KL less that of the line through native and the uniform quants at the bytes that
    it moves, within windows; None where it moves more or less than all of them.
    """

    record: Record
    outcome: Outcome
    clauses: tuple[Clause, ...]
    gap: Interval | None

    @property
    def decisive(self) -> list[Clause]:
        """The clauses that decided: all that failed, else all that are open, else all."""
        if self.outcome is Outcome.NOT_NEEDED:
            return [c for c in self.clauses if c.name == BYTES_MOVED]
        counted = [c for c in self.clauses if not c.skipped]
        for holds in (False, None):
            found = [c for c in counted if c.holds is holds]
            if found:
                return found
        return counted


# How the best candidate is chosen: what is compared first stands first, in words and as a key.
PREFERENCE = (
    ("the best outcome", lambda j: list(Outcome).index(j.outcome)),
    ("the fewest failed clauses", lambda j: sum(c.mark == "fails" for c in j.clauses)),
    (
        "the lowest KL against the uniform quants' line at the bytes that it moves",
        lambda j: math.inf if j.gap is None else j.gap.value,
    ),
    ("the lowest KL", lambda j: j.record.metrics.get("kl_mean_nats") or math.inf),
)


@dataclass(frozen=True)
class Verdict:
    """The answer for one budget and low format: its best candidate, and all of them.

    `why_open` says what is absent; then nothing else can decide.
    """

    low_format: str
    outcome: Outcome
    judgements: tuple[Judgement, ...]
    why_open: str | None = None

    @property
    def best(self) -> Judgement:
        """The first by `PREFERENCE`."""
        return min(
            self.judgements, key=lambda j: (*(key(j) for _, key in PREFERENCE), order(j.record))
        )


def verdicts(sweep: Sweep, rule: Rule) -> list[Verdict]:
    """One verdict for each (budget, low format) that has a candidate."""
    groups: dict[tuple[float, str], list[Record]] = {}
    for record in filter(is_candidate, sweep.records):
        key = trial(record).budget_mib, low_format(record) or ""
        groups.setdefault(key, []).append(record)
    found = []
    for (_, format_name), records in sorted(groups.items()):
        judgements = tuple(judge(record, sweep, rule) for record in records)
        why = _why_open(sweep, records[0], format_name)
        verdict = Verdict(format_name, Outcome.OPEN, judgements, why)
        if why is None:
            verdict = replace(verdict, outcome=verdict.best.outcome)
        found.append(verdict)
    return found


def _why_open(sweep: Sweep, record: Record, format_name: str) -> str | None:
    """What is absent of a budget and format; None where nothing is."""
    if not sweep.is_finished:
        total = len(sweep.study.trials)
        return f"the sweep is not finished: {sweep.n_absent} of {total} records are absent"
    native = sweep.native(record)
    if native is None:
        return "native was not measured at this budget"
    for failed in sweep.failed:
        same = trial(failed).budget_mib == trial(record).budget_mib
        if same and low_format(failed) in (format_name, None):
            return f"a trial failed: {sweep.label(failed)}"
    return None


def judge(record: Record, sweep: Sweep, rule: Rule) -> Judgement:
    """Applies `rule` to a candidate at its budget."""
    native = sweep.native(record)
    gap = _gap(record, sweep)
    clauses = (*limits(record, native, rule), _line(gap), _score(record, sweep),
               _speed(record, native, rule))  # fmt: skip
    holds = {c.name: c.holds for c in clauses if not c.skipped}
    by_score = holds.pop(SCORE)
    if native is not None and native.metrics.get("bytes_moved_per_token") == 0:
        outcome = Outcome.NOT_NEEDED
    elif False in holds.values():
        outcome = Outcome.NO
    elif by_score is False:
        outcome = Outcome.AS_RANDOM
    elif None in (*holds.values(), by_score):
        outcome = Outcome.OPEN
    else:
        outcome = Outcome.WORTH_IT
    return Judgement(record, outcome, clauses, gap)


def limits(record: Record, native: Record | None, rule: Rule) -> tuple[Clause, Clause, Clause]:
    """The clauses that a uniform quant has to keep too."""
    return _kl(record, rule), _tasks(record, native, rule), _bytes_moved(record, native, rule)


def _within(value: Interval, limit: float) -> bool | None:
    """Whether a figure is at most `limit`; None where its interval has the limit inside."""
    if value.high <= limit + _ROUNDING:
        return True
    return False if value.low > limit + _ROUNDING else None


def _kl(record: Record, rule: Rule) -> Clause:
    kl = record.interval("kl_mean_nats")
    if kl is None:
        return Clause("KL", None, "KL was not measured")
    text = f"KL {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}], limit {rule.kl_limit:g}"
    return Clause("KL", _within(kl, rule.kl_limit), text)


def task_names(record: Record) -> list[str]:
    """Metrics of a record that are shares of problems solved."""
    return [n.removesuffix("_problems") for n in record.metrics if n.endswith("_problems")]


def _tasks(record: Record, native: Record | None, rule: Rule) -> Clause:
    names = task_names(record) if native else []
    if native is None or not names:
        return Clause("tasks", None, "no task was scored: this clause was skipped", True)
    clauses = []
    for name in names:
        loss = paired.task_loss(record, native, name)
        shown = name.removeprefix("task_")
        if loss is None:
            clauses.append((None, 0.0, f"{shown} was not scored natively"))
        elif not native.metrics.get(f"{name}_correct"):
            clauses.append((None, 0.0, f"native solves no problem of {shown}: nothing can be lost"))
        else:
            text = (
                f"{shown} loses {loss.value:.3f} [{loss.low:.3f}, {loss.high:.3f}] on "
                f"{record.metrics[f'{name}_problems']} problems, limit {rule.task_loss_limit:g}"
            )
            clauses.append((_within(loss, rule.task_loss_limit), loss.value, text))
    rank = {False: 0, None: 1, True: 2}
    holds, _, text = min(clauses, key=lambda clause: (rank[clause[0]], -clause[1]))
    return Clause("tasks", holds, text)


def _bytes_moved(record: Record, native: Record | None, rule: Rule) -> Clause:
    moved = record.metrics.get("bytes_moved_per_token")
    rival = native.metrics.get("bytes_moved_per_token") if native else None
    if moved is None or rival is None:
        return Clause(BYTES_MOVED, None, "bytes moved are unknown for this plan or for native")
    if rival == 0:
        return Clause(BYTES_MOVED, False, "native experts move no bytes: all of them fit")
    text = (
        f"moves {moved / MIB:.3f} MiB a token, native {rival / MIB:.3f}: {ratio(moved / rival)}, "
        f"needed {rule.bytes_moved_ratio_needed:g}× or less"
    )
    return Clause(BYTES_MOVED, moved / rival <= rule.bytes_moved_ratio_needed, text)


def _gap(record: Record, sweep: Sweep) -> Interval | None:
    moved, kl_W = record.metrics.get("bytes_moved_per_token"), paired.kl_nats_W(record)
    if moved is None or kl_W is None:
        return None
    line_W = paired.line_at(moved, sweep.envelope(record))
    return None if line_W is None else paired.difference(kl_W, line_W)


def _line(gap: Interval | None) -> Clause:
    name = "uniform line"
    if gap is None:
        return Clause(name, None, "no uniform quant moves as many bytes, and none as few")
    ends = f"[{gap.low:+.4f}, {gap.high:+.4f}]"
    text = f"KL less the uniform line at the bytes moved {gap.value:+.4f} {ends}"
    return Clause(name, True if gap.high < 0 else False if gap.low > 0 else None, text)


def against_draws(record: Record, sweep: Sweep) -> list[Interval]:
    """KL of a plan less that of each draw of its random control, within windows.

    The control of a miss mode demotes as many uses: per draw, the straight line between native,
    the random shares of that seed and the uniform quant, at the share that the mode demoted.
    """
    own_W = paired.kl_nats_W(record)
    draws = [r for r in sweep.draws(record) if paired.kl_nats_W(r) is not None]
    if own_W is None or not draws:
        return []
    if not isinstance(trial(record).plan, MissModeTrial):
        return [paired.difference(own_W, _kl_of(draw)) for draw in draws]
    at = record.metrics.get("demoted_share")
    uniform = [r for r in sweep.uniform(record) if low_format(r) == low_format(record)]
    found = []
    for seed in sorted({trial(draw).seed for draw in draws}):
        same_seed = [draw for draw in draws if trial(draw).seed == seed]
        points = [(0.0, np.zeros_like(own_W))]
        for other in (*same_seed, *uniform):
            share = other.metrics.get("demoted_share")
            if share is not None and paired.kl_nats_W(other) is not None:
                points.append((float(share), _kl_of(other)))
        control_W = None if at is None else paired.line_at(at, points)
        if control_W is not None:
            found.append(paired.difference(own_W, control_W))
    return found


def _kl_of(record: Record) -> np.ndarray:
    found = paired.kl_nats_W(record)
    assert found is not None
    return found


def relation(differences: list[Interval]) -> str | None:
    """ "below" every draw, "above" every draw, or neither; None without a draw."""
    if not differences:
        return None
    if all(d.high < 0 for d in differences):
        return "below"
    return "above" if all(d.low > 0 for d in differences) else "not told apart"


def _score(record: Record, sweep: Sweep) -> Clause:
    differences = against_draws(record, sweep)
    found = relation(differences)
    if found is None:
        return Clause(SCORE, None, "there is no random control at this share and format")
    mean = sum(d.value for d in differences) / len(differences)
    where = {"below": "below every", "above": "above every", "not told apart": "not below every"}
    text = f"KL is {where[found]} one of {len(differences)} random draws (mean {mean:+.4f})"
    return Clause(SCORE, found == "below", text)


def _speed(record: Record, native: Record | None, rule: Rule) -> Clause:
    if not on_gpu(record):
        return Clause("speed", None, "decode speed was not measured on a GPU", True)
    own = record.interval("decode_tokens_per_s")
    rival = native.interval("decode_tokens_per_s") if native else None
    few = min(len(r.samples.get("repeat_s", ())) if r else 0 for r in (record, native))
    if own is None or rival is None or native is None or record.device != native.device or few < 2:
        return Clause("speed", None, "decode speed has no comparable native timing")
    speedup = Interval(own.value / rival.value, own.low / rival.high, own.high / rival.low)
    holds = speedup.value >= rule.speedup_needed and speedup.low > 1
    shown = number(speedup, ".2f")
    return Clause(
        "speed", holds, f"decodes {shown}× as fast as native, needed {rule.speedup_needed:g}×"
    )
