"""The rule that turns records into answers.

Owns what "worth it" means. The limits are the config's; nothing here can move them. What the
records cannot settle is open, never yes and never no: a figure that is absent, an interval that
has the limit inside, a trial that is missing or failed.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from hobbit_jax.record import Native, Record, Uniform
from hobbit_jax.record.typed_json import typed
from hobbit_jax.report import paired
from hobbit_jax.report.sweep import (
    Sweep,
    is_candidate,
    low_format,
    on_gpu,
    order,
    task_names,
    trial,
)
from hobbit_jax.report.table import MIB, figure, ratio
from hobbit_jax.statistics import Interval

BYTES_MOVED, SCORE = "bytes moved", "score"
_MOVED = "bytes_moved_per_token"
_SIGNIFICANT = 0.05
# Of fewer windows the bootstrap's interval, which the record has, is too narrow.
_FEW_WINDOWS = 20
_ROUNDING = 1e-9  # of a difference of two shares, so that a loss of exactly the limit passes


@dataclass(frozen=True)
class Rule:
    """The limits stated beforehand; units in the names, `kl_limit` in nats a token."""

    kl_limit: float
    speedup_needed: float
    bytes_moved_ratio_needed: float
    task_loss_limit: float

    @classmethod
    def of(cls, rule: Mapping[str, object]) -> "Rule":
        """Reads the rule of a sweep.

        Raises:
            ValueError: a limit is absent or no number.
        """
        names = {field.name for field in fields(cls)}
        return typed({n: limit for n, limit in rule.items() if n in names}, cls, "config.rule")


class Outcome(StrEnum):
    """The answers of one candidate or of one budget and format, in the order of preference."""

    WORTH_IT = "worth it"
    OPEN = "open"
    AS_RANDOM = "no better than demoting at random"
    NO = "not worth it"
    NOT_NEEDED = "not needed: all native experts fit"


Mark = Literal["fails", "open", "holds", "skipped"]


class Clause(NamedTuple):
    """One clause of the rule: "open" where the records cannot say, "skipped" does not count."""

    name: str
    mark: Mark
    text: str


@dataclass(frozen=True, eq=False)
class Judgement:
    """The rule applied to one plan at one budget."""

    record: Record
    sweep: Sweep
    rule: Rule

    @cached_property
    def native(self) -> Record | None:
        """The native record at the same budget."""
        return self.sweep.native(self.record)

    @cached_property
    def gap(self) -> Interval | None:
        """KL less that of the line through native and the uniform quants at the bytes moved.

        Within windows; None where the plan moves more or less than all of them.
        """
        moved, kl_W = self.record.metrics.get(_MOVED), paired.kl_nats_W(self.record)
        if moved is None or kl_W is None:
            return None
        line_W = paired.line_at(moved, self.sweep.envelope(self.record))
        return None if line_W is None else paired.difference(kl_W, line_W)

    @cached_property
    def limits(self) -> tuple[Clause, ...]:
        """The clauses that a uniform quant has to keep too."""
        return _kl(self), _tasks(self), _bytes_moved(self)

    @cached_property
    def clauses(self) -> tuple[Clause, ...]:
        """All of them."""
        return *self.limits, _line(self), _score(self), _speed(self)

    @cached_property
    def outcome(self) -> Outcome:
        """What the clauses come to."""
        marks = {c.name: c.mark for c in self.clauses}
        by_score = marks.pop(SCORE)
        if self.native is not None and _native_fits(self.native):
            return Outcome.NOT_NEEDED
        if "fails" in marks.values():
            return Outcome.NO
        if by_score == "fails":
            return Outcome.AS_RANDOM
        return Outcome.OPEN if "open" in (*marks.values(), by_score) else Outcome.WORTH_IT

    @property
    def decisive(self) -> list[Clause]:
        """The clauses that decided: all that failed, else all that are open, else all that hold."""
        if self.outcome is Outcome.NOT_NEEDED:
            return [c for c in self.clauses if c.name == BYTES_MOVED]
        marks = {c.mark for c in self.clauses}
        first = next((mark for mark in ("fails", "open") if mark in marks), "holds")
        return [c for c in self.clauses if c.mark == first]


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

    budget_mib: float
    low_format: str
    judgements: tuple[Judgement, ...]
    why_open: str | None = None

    @property
    def best(self) -> Judgement | None:
        """The first by `PREFERENCE`; None where every candidate failed."""
        return min(
            self.judgements,
            key=lambda j: (*(key(j) for _, key in PREFERENCE), order(j.record)),
            default=None,
        )

    @property
    def outcome(self) -> Outcome:
        """The best candidate's, unless something is absent."""
        return self.best.outcome if self.best and self.why_open is None else Outcome.OPEN


def verdicts(sweep: Sweep, rule: Rule) -> list[Verdict]:
    """One verdict for each (budget, low format) that has a candidate, failed ones included."""
    groups: dict[tuple[float, str], list[Record]] = defaultdict(list)
    for record in filter(is_candidate, (*sweep.records, *sweep.failed)):
        groups[trial(record).budget_mib, low_format(record)].append(record)
    return [
        Verdict(
            *cell,
            tuple(Judgement(r, sweep, rule) for r in records if r.status == "ok"),
            _why_open(sweep, records[0]),
        )
        for cell, records in sorted(groups.items())
    ]


def _why_open(sweep: Sweep, record: Record) -> str | None:
    """What is absent of the budget and format of `record`; None where nothing is."""
    if sweep.n_absent:
        total = len(sweep.study.trials)
        return f"the sweep is not finished: {sweep.n_absent} of {total} records are absent"
    if sweep.native(record) is None:
        return "native was not measured at this budget"
    pool = operator.attrgetter("budget_mib", "policy", "misses")
    for failed in sweep.failed:
        # Native and the uniform quants of any format are parts of the line.
        in_line = isinstance(trial(failed).plan, Native | Uniform)
        counts = in_line or low_format(failed) == low_format(record)
        if counts and pool(trial(failed)) == pool(trial(record)):
            return f"a trial failed: {sweep.label(failed)}"
    return None


def _native_fits(native: Record) -> bool:
    """Whether the pool has a slot for every native expert, or nothing was moved."""
    slots, experts = (native.metrics.get(name) for name in ("slots_total", "experts"))
    return native.metrics.get(_MOVED) == 0 or bool(slots and experts and slots >= experts)


def _within(value: Interval, limit: float) -> Mark:
    """Whether a figure is at most `limit`: open where its interval has the limit inside."""
    if value.high <= limit + _ROUNDING:
        return "holds"
    return "fails" if value.low > limit + _ROUNDING else "open"


def _kl(j: Judgement) -> Clause:
    kl, kl_W = j.record.interval("kl_mean_nats"), paired.kl_nats_W(j.record)
    limit = j.rule.kl_limit
    if kl is None:
        return Clause("KL", "open", "KL was not measured")
    if kl_W is not None and len(kl_W) < _FEW_WINDOWS:
        kl = paired.mean_interval(kl_W)
    return Clause("KL", _within(kl, limit), f"KL {figure(kl, '.4f')}, limit {limit:g}")


def _tasks(j: Judgement) -> Clause:
    """The clause of the task that says least for the plan."""
    names, limit = task_names(j.record), j.rule.task_loss_limit
    if j.native is None or not names:
        return Clause("tasks", "skipped", "no task was scored: this clause was skipped")
    found = []
    for name in names:
        loss, shown = paired.task_loss(j.record, j.native, name), name.removeprefix("task_")
        mark, text, value = "open", f"{shown} was not scored natively", 0.0
        if loss is not None and not j.native.metrics.get(f"{name}_correct"):
            text = f"native solves no problem of {shown}: nothing can be lost"
        elif loss is not None:
            problems = j.record.metrics[f"{name}_problems"]
            text = f"{shown} loses {figure(loss, '.3f')} on {problems} problems, limit {limit:g}"
            mark, value = _within(loss, limit), loss.value
        found.append((("fails", "open", "holds").index(mark), -value, Clause("tasks", mark, text)))
    return min(found)[-1]


def _bytes_moved(j: Judgement) -> Clause:
    moved, needed = j.record.metrics.get(_MOVED), j.rule.bytes_moved_ratio_needed
    rival = j.native.metrics.get(_MOVED) if j.native else None
    if j.native is None or moved is None or rival is None:
        return Clause(BYTES_MOVED, "open", "bytes moved are unknown for this plan or for native")
    if _native_fits(j.native):
        return Clause(BYTES_MOVED, "skipped", "all native experts fit: no bytes have to be saved")
    # Records of before 2026-11-30 have totals alone.
    found = paired.ratio_over_prompts(j.record, j.native, "bytes_moved")
    found = found or Interval(moved / rival, moved / rival, moved / rival)
    shown = ratio(found.value) if found.low == found.high else f"{figure(found, '.2f')}×"
    text = (
        f"moves {moved / MIB:.3f} MiB a token, native {rival / MIB:.3f}: {shown}, "
        f"needed {needed:g}× or less"
    )
    return Clause(BYTES_MOVED, _within(found, needed), text)


def _line(j: Judgement) -> Clause:
    name = "uniform line"
    if j.gap is None:
        return Clause(name, "open", "no uniform quant moves as many bytes, and none as few")
    marks: dict[str | None, Mark] = {"below": "holds", "above": "fails"}
    text = f"KL less the uniform line at the bytes moved {figure(j.gap, '+.4f')}"
    return Clause(name, marks.get(paired.relation(j.gap), "open"), text)


class Control(NamedTuple):
    """A plan against demoting at random."""

    n_draws: int  # of the control, each matched to the plan in the share of uses that are demoted
    difference: Interval  # KL of the plan less the mean of the draws, within windows
    spread: float  # standard deviation of the draws' KL
    p: float  # chance that one more draw has a KL as low as the plan's, by Student's t
    n_compared: int  # plans that are compared so; Bonferroni's correction multiplies by it

    @property
    def relation(self) -> str:
        """ "below" or "above" random choice after the correction, or "not told apart"."""
        if self.p * self.n_compared <= _SIGNIFICANT:
            return "below"
        above = (1 - self.p) * self.n_compared <= _SIGNIFICANT
        return "above" if above else "not told apart"


def control(record: Record, sweep: Sweep) -> Control | None:
    """A plan against its random control; None with fewer than two draws.

    The control demotes as many uses: per draw, the straight line between native, the random shares
    of that seed and the uniform quant, at the share of uses that the plan demotes.
    """
    own_W, at = paired.kl_nats_W(record), record.metrics.get("demoted_share")
    if own_W is None or at is None:
        return None
    uniform = [r for r in sweep.uniform(record) if low_format(r) == low_format(record)]
    by_seed: dict[int, list[Record]] = defaultdict(list)
    for draw in sweep.draws(record):
        by_seed[trial(draw).seed].append(draw)
    native, found = (0.0, np.zeros_like(own_W)), []
    for draws in by_seed.values():
        rivals = paired.points([*draws, *uniform], lambda r: r.metrics.get("demoted_share"))
        found.append(paired.line_at(at, [native, *rivals]))
    drawn = [drawn_W for drawn_W in found if drawn_W is not None]
    if len(drawn) < 2:
        return None
    drawn_DW = np.stack(drawn)
    own_W, kl_D = own_W[: drawn_DW.shape[1]], drawn_DW.mean(axis=1)
    return Control(
        len(kl_D),
        paired.difference(own_W, drawn_DW.mean(axis=0)),
        float(kl_D.std(ddof=1)),
        float(stats.ttest_ind([own_W.mean()], kl_D, alternative="less").pvalue),  # pyright: ignore
        len(sweep.candidates()),
    )


def _score(j: Judgement) -> Clause:
    found = control(j.record, j.sweep)
    if found is None:
        return Clause(SCORE, "open", "there is no random control at this share and format")
    text = (
        f"KL less the mean of {found.n_draws} random draws {figure(found.difference, '+.4f')}, "
        f"p {found.p:.2g} of {found.n_compared} compared"
    )
    if found.relation == "below" and found.difference.high < 0:
        return Clause(SCORE, "holds", text)
    return Clause(SCORE, "fails" if found.difference.low >= 0 else "open", text)


def _speed(j: Judgement) -> Clause:
    record, native, needed = j.record, j.native, j.rule.speedup_needed
    if not on_gpu(record):
        return Clause("speed", "skipped", "decode speed was not measured on a GPU")
    own = record.interval("decode_tokens_per_s")
    rival = native.interval("decode_tokens_per_s") if native else None
    few = min(len(r.samples.get("repeat_s", ())) if r else 0 for r in (record, native))
    if own is None or rival is None or native is None or record.device != native.device or few < 2:
        return Clause("speed", "open", "decode speed has no comparable native timing")
    speedup = Interval(own.value / rival.value, own.low / rival.high, own.high / rival.low)
    text = f"decodes {figure(speedup, '.2f')}× as fast as native, needed {needed:g}×"
    if speedup.value >= needed and speedup.low > 1:
        return Clause("speed", "holds", text)
    return Clause("speed", "fails" if speedup.high < needed else "open", text)
