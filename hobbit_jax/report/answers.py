"""What the answers of the first page rest on: counts and comparisons over all verdicts.

The sentences stand in `templates/answers.md.j2`. They follow what was found in most cases, not the
best case; whatever is open is called open.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from hobbit_jax.record import MissModeTrial, Mixed, Record, Records, Uniform
from hobbit_jax.report.frontier import Averaged, Frontier
from hobbit_jax.report.paired import relation
from hobbit_jax.report.sweep import RANDOM, Sweep, low_format, scored_tasks, trial
from hobbit_jax.report.table import ratio
from hobbit_jax.report.verdict import Judgement, Outcome, Rule, Verdict, control
from hobbit_jax.statistics import Interval

OUTCOMES = list(Outcome)
BENCHMARKS = ("gsm8k", "humaneval")  # that were asked for; another form of one counts as it


class UniformQuant(NamedTuple):
    """A uniform quant over all budgets. `status` is "yes", "no" or "open"."""

    format: str
    status: str
    why: str
    records: tuple[Record, ...]

    @property
    def kl(self) -> Interval | None:
        """Of the first record, since it does not depend on the budget; None where all failed."""
        return self.records[0].interval("kl_mean_nats") if self.records else None

    @property
    def encoded(self) -> str:
        """The encoder, and what it was calibrated on."""
        asked = trial(self.records[0]) if self.records else None
        method = getattr(asked and asked.plan, "encoder", "an encoder without a record")
        text = asked and asked.inputs.calibration_text
        return f"{method} on {text}" if text else f"{method} on source code"

    @property
    def budgets(self) -> str:
        """All of them in MiB."""
        return ", ".join(f"{trial(r).budget_mib:g}" for r in self.records)

    def over_native(self, sweep: Sweep, metric: str) -> str:
        """A metric over native's at each budget."""
        return ", ".join(ratio(sweep.over_native(r, metric)) for r in self.records)


def uniform_quants(sweep: Sweep, rule: Rule) -> list[UniformQuant]:
    """The uniform quants, the nearest to native first."""
    groups: dict[str, list[Record]] = {}
    for record in (*sweep.records, *sweep.failed):
        if isinstance(trial(record).plan, Uniform):
            groups.setdefault(low_format(record), []).append(record)
    found = []
    for name, asked in groups.items():
        records = [record for record in asked if record.status == "ok"]
        clauses = [c for r in records for c in Judgement(r, sweep, rule).limits]
        failed, unsettled = ([c.text for c in clauses if c.mark == m] for m in ("fails", "open"))
        if failed:
            status, why = "no", failed[0]
        elif sweep.n_absent:
            status, why = "open", "the sweep is not finished"
        elif len(records) < len(asked):
            status, why = "open", "a trial of it failed"
        else:
            status, why = ("open", unsettled[0]) if unsettled else ("yes", "all limits are kept")
        found.append(UniformQuant(name, status, why, tuple(records)))
    return sorted(found, key=lambda quant: quant.kl.value if quant.kl else 0)


def mixes(verdicts: Sequence[Verdict], by_miss: bool = False) -> list[Judgement]:
    """The candidates by an importance score, or those that are miss modes."""
    judged = [j for verdict in verdicts for j in verdict.judgements]
    return [j for j in judged if isinstance(trial(j.record).plan, MissModeTrial) == by_miss]


def against_line(judged: Sequence[Judgement]) -> dict[str, Counter[str | None]]:
    """By low format, how many candidates have which `relation` to the uniform line."""
    found: dict[str, Counter[str | None]] = defaultdict(Counter)
    for j in sorted(judged, key=lambda j: low_format(j.record)):
        found[low_format(j.record)][relation(j.gap)] += 1
    return found


class Score(NamedTuple):
    """An importance score: how often it has which `relation` to random choice, and to the line."""

    name: str
    against_draws: Counter[str | None]
    against_line: Counter[str | None]

    @property
    def pays(self) -> bool:
        """Better than chance in most cases, and than the uniform quants in one."""
        better = self.against_draws["below"]
        return 2 * better > self.against_draws.total() and self.against_line["below"] > 0


def scores(sweep: Sweep, judged: Sequence[Judgement]) -> list[Score]:
    """Every importance score of the sweep."""
    found: dict[str, Score] = {}
    for record in sweep.per_plan():
        name = getattr(trial(record).plan, "score", RANDOM)
        if name != RANDOM:
            drawn = control(record, sweep)
            score = found.setdefault(name, Score(name, Counter(), Counter()))
            score.against_draws[drawn and drawn.relation] += 1
    for j in judged:
        name = getattr(trial(j.record).plan, "score", "")
        if name in found:
            found[name].against_line[relation(j.gap)] += 1
    return list(found.values())


def encoders(frontier: Frontier | None) -> dict[str, list[Averaged]]:
    """By format, the uniform quants of every encoder."""
    plans = frontier.uniform if frontier else ()
    formats = sorted({p.formats[0] for p in plans})
    return {name: [p for p in plans if p.formats[0] == name] for name in formats}


def within(frontiers: Sequence[Frontier], kl_limit: float) -> list[str]:
    """Uniform quants whose KL is at most a limit on every text of a study."""
    first, *others = frontiers
    plans = [p for p in first.uniform if all((p.plan, p.text) in f.by_plan for f in others)]
    return [
        f"{p.formats[0]} by {p.encoder}"
        for p in plans
        if all(f.by_plan[p.plan, p.text].kl.high <= kl_limit for f in frontiers)
    ]


def real_costs(frontiers: Sequence[Frontier]) -> list[str]:
    """What K-quants cost on the texts of a study, by encoders that are still here."""
    found: dict[str, list[float]] = {}
    for frontier in frontiers:
        for p in frontier.uniform:
            if p.formats[0].endswith("_K") and p.encoder in ("gptq", "ggml"):
                found.setdefault(p.formats[0], []).append(p.kl.value)
    return [
        f"{name} cost {min(kl):.3f} to {max(kl):.3f}"
        for name, kl in sorted(found.items(), reverse=True)
    ]


def open_tasks(judged: Sequence[Judgement]) -> int | None:
    """The number of candidates if the clause of tasks is open for every one of them."""
    marks = [c.mark for j in judged for c in j.limits if c.name == "tasks"]
    return len(marks) if marks and set(marks) == {"open"} else None


def benchmarks(sweep: Sweep, real: Sequence[Frontier]) -> dict[str, str]:
    """Which of `BENCHMARKS` are scored, and the name of the model."""
    scored = [(sweep.model, name) for name in sweep.tasks]
    for frontier in real:
        scored += [(frontier.model, name) for name in scored_tasks(frontier.scored.values())]
    return {b: model for model, name in scored for b in BENCHMARKS if name.startswith(b)}


def unused_share(sweep: Sweep, mixed: bool) -> str:
    """Mean share of a full pool's bytes in no slot, of mixed plans or of the others."""
    shares = []
    for record in sweep.records:
        used = record.metrics.get("pool_device_bytes") or 0
        pool = record.metrics.get("pool_budget_bytes") or 0
        if 0 < pool < sweep.native_bytes and isinstance(trial(record).plan, Mixed) == mixed:
            shares.append(1 - used / pool)
    return f"{100 * sum(shares) / len(shares):.1f} %" if shares else "an unknown share"


def emulated_speedups(found: Records) -> list[str]:
    """Decode against native's on an emulated link, from the study `decode`."""
    speedups: dict[str, list[float]] = {}
    for record in found.of("decode"):
        speed = record.metrics.get("speedup")
        for name in ("fetch_low", "uniform low"):
            if str(record.setting.get("setting")).startswith(name) and speed is not None:
                speedups.setdefault(name, []).append(speed)
    return [f"{name} {min(own):.2f} to {max(own):.2f}×" for name, own in speedups.items()]
