"""Tables of a sweep of the cache: quality, cost at equal bytes, candidates, comparisons.

Owns which metric stands in which table. A metric is shown by one `Column`.
"""

from __future__ import annotations

from collections.abc import Sequence

from hobbit_jax.record import Record
from hobbit_jax.report.sweep import RANDOM, Sweep, at, is_candidate, on_gpu, order, trial
from hobbit_jax.report.table import MIB, Column, interval, number, percent, ratio, table
from hobbit_jax.report.verdict import PREFERENCE, Verdict, against_draws, relation, task_names


def quality(sweep: Sweep) -> str:
    """What each plan loses, and in how many bytes."""
    tasks = sorted({name for record in sweep.records for name in task_names(record)})
    columns = [
        Column("plan", sweep.label),
        Column("budget", _budget_of_miss_mode),
        Column("stored, MiB", "stored_bytes", ".2f", unit=MIB),
        Column("of native", lambda r: _share(r, "stored_bytes", "native_bytes")),
        Column("bits per byte", "bits_per_byte", ".4f"),
        Column("perplexity", "perplexity", ".3f"),
        Column("KL mean", "kl_mean_nats", ".4f", interval=True),
        Column("KL p99", "kl_p99_nats", ".3f", interval=True),
        Column("KL p99.9", "kl_p999_nats", ".3f", interval=True),
        Column("top-1", "top1_agreement", ".3f", interval=True),
        *(Column(name.removeprefix("task_"), name, ".2f", interval=True) for name in tasks),
    ]
    return table(columns, sweep.per_plan())


def _budget_of_miss_mode(record: Record) -> str | None:
    return at(record) if hasattr(trial(record).plan, "mode") else None


def _share(record: Record, part: str, whole: str) -> str | None:
    values = [record.metrics.get(name) for name in (part, whole)]
    return ratio(values[0] / values[1]) if values[0] is not None and values[1] else None


def cost(sweep: Sweep, budget_mib: float) -> str:
    """What each plan costs under one budget."""

    def resident(record: Record) -> str | None:
        here, all_of_them = (record.metrics.get(n) for n in ("resident_experts", "experts"))
        return None if here is None else f"{here}/{all_of_them}"

    def slots(record: Record) -> str:
        found = {n: v for n, v in record.metrics.items() if n.startswith("slots_")}
        return ", ".join(f"{n[6:]} {v}" for n, v in found.items() if n != "slots_total")

    columns = [
        Column("plan", sweep.label),
        Column("slots", slots),
        Column("pool, MiB", "pool_device_bytes", ".2f", unit=MIB),
        Column("resident experts", resident),
        Column("hit rate", "hit_rate", ".3f"),
        Column("demoted share", "demoted_share", ".3f"),
        Column("skipped share", "skipped_share", ".3f"),
        Column("host round trips a token", "host_round_trips_per_token", ".2f"),
        Column("MiB moved a token", "bytes_moved_per_token", ".3f", unit=MIB),
        Column("of native", lambda r: ratio(sweep.over_native(r, "bytes_moved_per_token"))),
        Column("MiB read a token", "bytes_read_per_token", ".3f", unit=MIB),
        Column("first token, s", "first_token_s", ".3f"),
    ]
    if any(map(on_gpu, sweep.records)):
        columns.append(Column("decode tokens/s", "decode_tokens_per_s", ".1f", interval=True))
    return table(columns, [r for r in sweep.records if trial(r).budget_mib == budget_mib])


def candidates(sweep: Sweep, found: Sequence[Verdict]) -> str:
    """How every candidate fares in every clause."""
    judged = [judgement for verdict in found for judgement in verdict.judgements]
    clauses = [clause.name for clause in judged[0].clauses] if judged else []
    columns = [
        Column("budget", lambda j: at(j.record)),
        Column("plan", lambda j: sweep.label(j.record)),
        *(Column(name, lambda j, i=i: j.clauses[i].mark) for i, name in enumerate(clauses)),
        Column("KL less the uniform line", lambda j: j.gap, "+.4f"),
        Column("outcome", lambda j: j.outcome.value),
    ]
    return table(columns, judged)


def preference() -> str:
    """The order in which a best candidate is chosen, in words."""
    return ", then ".join(words for words, _ in PREFERENCE)


def verdict_table(sweep: Sweep, found: Sequence[Verdict]) -> str:
    """The answer at each budget and format."""

    def decided(verdict: Verdict) -> str:
        return verdict.why_open or "; ".join(c.text for c in verdict.best.decisive)

    columns = [
        Column("budget", lambda v: at(v.best.record)),
        Column("low format", "low_format"),
        Column("mixing is", lambda v: v.outcome.value),
        Column("best candidate", lambda v: sweep.label(v.best.record)),
        Column("what decided", decided),
    ]
    return table(columns, found)


def against_control(sweep: Sweep) -> str:
    """Every candidate's KL against its random control, in pairs."""

    def share(record: Record) -> str | None:
        plan = trial(record).plan
        at = record.metrics.get("demoted_share") if hasattr(plan, "mode") else None
        return (
            number(100 * at, ".0f") + " %" if at is not None else percent(getattr(plan, "share", 0))
        )

    def draws(record: Record) -> str | None:
        shown = [interval(d, "+.4f") for d in against_draws(record, sweep)]
        return "; ".join(shown) or None

    columns = [
        Column("plan", sweep.label),
        Column("budget", _budget_of_miss_mode),
        Column("demoted", share),
        Column("windows", lambda r: len(r.samples["kl_nats_W"])),
        Column("KL", "kl_mean_nats", ".4f", interval=True),
        Column("less each random draw", draws),
        Column("against random", lambda r: relation(against_draws(r, sweep))),
    ]
    found = [record for record in sweep.per_plan() if is_candidate(record)]
    return table(
        columns, sorted(found, key=lambda r: (getattr(trial(r).plan, "format", ""), order(r)))
    )


def scores_below_control(sweep: Sweep) -> dict[str, list[str | None]]:
    """Of each importance score, its relation to the random control at every share and format."""
    found: dict[str, list[str | None]] = {}
    for record in sweep.per_plan():
        score = getattr(trial(record).plan, "score", RANDOM)
        if score != RANDOM:
            found.setdefault(score, []).append(relation(against_draws(record, sweep)))
    return found


def absent(sweep: Sweep) -> str:
    """Trials without a usable record, and why."""
    rows = [
        *((r.name, "failed", r.error or "no error was recorded") for r in sweep.failed),
        *((name, "missing", "no record") for name in sweep.missing),
        *((where, "unreadable", why) for where, why in sweep.unreadable.items()),
        *((name, "not of this sweep", "left out everywhere") for name in sweep.foreign),
    ]
    heads = ("record", "state", "reason")
    return table([Column(head, lambda row, i=i: row[i]) for i, head in enumerate(heads)], rows)


def provenance(records: Sequence[Record]) -> str:
    """Revisions, hashes, device and versions; each value once."""
    facts: dict[str, set[str]] = {}
    for record in records:
        values = {
            "revision": record.revision,
            "device": record.device,
            **{f"sha256 of {name}": value for name, value in record.file_sha256.items()},
            **{f"version of {name}": value for name, value in record.versions.items()},
        }
        for name, value in values.items():
            facts.setdefault(name, set()).add(str(value))
    columns = [Column("what", lambda f: f[0]), Column("value", lambda f: ", ".join(sorted(f[1])))]
    return table(columns, facts.items())
