"""Tables of a sweep of the cache: quality, cost at equal bytes, candidates, comparisons.

Owns which metric stands in which table. A metric is shown by one `Column`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hobbit_jax.record import Record
from hobbit_jax.report.sweep import Sweep, at, low_format, order, trial
from hobbit_jax.report.table import MIB, Column, ratio, table
from hobbit_jax.report.verdict import Verdict, control


def quality(sweep: Sweep) -> str:
    """What each plan loses, and in how many bytes.

    Perplexities of a miss mode are of fewer windows, so they are left out.
    """

    def stored(record: Record) -> str | None:
        own, native = (record.metrics.get(f"{which}_bytes") for which in ("stored", "native"))
        return ratio(own / native) if own is not None and native else None

    def of_all_windows(metric: str) -> Callable[[Record], float | None]:
        return lambda r: None if _budget_of_miss_mode(r) else r.metrics.get(metric)

    columns = [
        Column("plan", sweep.label),
        Column("budget", _budget_of_miss_mode),
        Column("stored, MiB", "stored_bytes", ".2f", unit=MIB),
        Column("of native", stored),
        Column("bits per byte", of_all_windows("bits_per_byte"), ".4f"),
        Column("perplexity", of_all_windows("perplexity"), ".3f"),
        Column("KL mean", "kl_mean_nats", ".4f", interval=True),
        Column("KL p99", "kl_p99_nats", ".3f", interval=True),
        Column("KL p99.9", "kl_p999_nats", ".3f", interval=True),
        Column("top-1", "top1_agreement", ".3f", interval=True),
        *(Column(name, f"task_{name}", ".2f", interval=True) for name in sweep.tasks),
    ]
    return table(columns, sweep.per_plan())


def _budget_of_miss_mode(record: Record) -> str | None:
    return at(record) if hasattr(trial(record).plan, "mode") else None


def cost(sweep: Sweep, budget_mib: float) -> str:
    """What each plan costs under one budget."""

    def resident(record: Record) -> str | None:
        here, all_of_them = (record.metrics.get(n) for n in ("resident_experts", "experts"))
        return None if here is None else f"{here}/{all_of_them}"

    def slots(record: Record) -> str:
        found = record.under("slots_")
        return ", ".join(f"{name} {n}" for name, n in found.items() if name != "total")

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
    if sweep.gpu_records:
        columns.append(Column("decode tokens/s", "decode_tokens_per_s", ".1f", interval=True))
    return table(columns, [r for r in sweep.records if trial(r).budget_mib == budget_mib])


def policies(sweep: Sweep) -> str:
    """Bytes moved under each cache policy, a row a plan and budget."""
    found = {
        (trial(r).policy, replace(trial(r), policy="")): r
        for r in (*sweep.records, *sweep.other_policies)
    }

    def moved(record: Record, policy: str) -> float | None:
        other = found.get((policy, replace(trial(record), policy="")))
        return other and other.metrics.get("bytes_moved_per_token")

    columns = [
        Column("plan", sweep.label),
        Column("budget", at),
        *(
            Column(f"MiB moved a token, {name}", lambda r, n=name: moved(r, n), ".3f", unit=MIB)
            for name in dict.fromkeys(name for name, _ in found)
        ),
    ]
    return table(columns, sweep.records)


def candidates(sweep: Sweep, found: Sequence[Verdict]) -> str:
    """How every candidate fares in every clause."""
    judged = [judgement for verdict in found for judgement in verdict.judgements]
    clauses = [clause.name for clause in judged[0].clauses] if judged else []
    columns = [
        Column("budget", lambda j: at(j.record)),
        Column("plan", lambda j: sweep.label(j.record)),
        *(Column(name, lambda j, i=i: j.clauses[i].mark) for i, name in enumerate(clauses)),
        Column("KL less the uniform line", lambda j: j.gap, "+.4f"),
        Column("outcome", "outcome"),
    ]
    return table(columns, judged)


def verdict_table(sweep: Sweep, found: Sequence[Verdict]) -> str:
    """The answer at each budget and format."""

    def decided(verdict: Verdict) -> str:
        found = "; ".join(c.text for c in verdict.best.decisive) if verdict.best else ""
        return verdict.why_open or found

    columns = [
        Column("budget", lambda v: f"{v.budget_mib:g} MiB"),
        Column("low format", "low_format"),
        Column("mixing is", "outcome"),
        Column("best candidate", lambda v: v.best and sweep.label(v.best.record)),
        Column("what decided", decided),
    ]
    return table(columns, found)


def against_control(sweep: Sweep) -> str:
    """Every candidate's KL against demoting as many uses at random."""
    rows = sorted(sweep.candidates(), key=lambda r: (low_format(r), order(r)))
    found = {record.name: control(record, sweep) for record in rows}

    def of_control(field: str) -> Callable[[Record], Any]:
        return lambda record: (own := found[record.name]) and getattr(own, field)

    columns = [
        Column("plan", sweep.label),
        Column("budget", _budget_of_miss_mode),
        Column("demoted uses", "demoted_share", ".0%"),
        Column("windows", lambda r: len(r.samples["kl_nats_W"])),
        Column("KL", "kl_mean_nats", ".4f", interval=True),
        Column("draws", of_control("n_draws")),
        Column("their standard deviation", of_control("spread"), ".4f"),
        Column("KL less their mean", of_control("difference"), "+.4f"),
        Column("p", of_control("p"), ".2g"),
        Column("against random", of_control("relation")),
    ]
    return table(columns, rows)


def provenance(records: Sequence[Record]) -> dict[str, set[str]]:
    """Revisions, hashes, device and versions by name, each value once."""
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
    return facts
