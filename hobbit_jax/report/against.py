"""Two sweeps side by side: the same trial in both, metric by metric.

Owns `scripts/report.py --against`. Trials pair by plan, budget and seed; what else differs (model,
texts, sizes, revision) is named on top, since it is what the comparison is about.
"""

from __future__ import annotations

from dataclasses import fields

from hobbit_jax.record import Record
from hobbit_jax.report import paired
from hobbit_jax.report.sweep import Sweep, at, trial
from hobbit_jax.report.table import MIB, Column, table
from hobbit_jax.statistics import Interval

_METRICS = (
    ("KL mean", "kl_mean_nats", ".4f", 1),
    ("perplexity", "perplexity", ".3f", 1),
    ("stored, MiB", "stored_bytes", ".2f", MIB),
    ("MiB moved a token", "bytes_moved_per_token", ".3f", MIB),
    ("hit rate", "hit_rate", ".3f", 1),
    ("resident experts", "resident_experts", "d", 1),
    ("first token, s", "first_token_s", ".3f", 1),
)


def render(ours: Sweep, other: Sweep, names: tuple[str, str]) -> str:
    """The comparison as Markdown.

    Args:
        ours, other: two sweeps.
        names: how they are called, such as their folders.

    Raises:
        ValueError: no trial is in both.
    """

    def key(record: Record) -> tuple[object, ...]:
        asked = trial(record)
        pool = asked.budget_mib, asked.policy, asked.misses, asked.link_to_host
        return asked.plan, asked.seed, *pool

    there = {key(record): record for record in other.records}
    pairs = [(record, there[key(record)]) for record in ours.records if key(record) in there]
    if not pairs:
        raise ValueError(
            f"no trial of {names[0]} is in {names[1]}; want sweeps that share plans and budgets"
        )
    columns = [
        Column("plan", lambda pair: ours.label(pair[0])),
        Column("budget", lambda pair: at(pair[0])),
        *(
            Column(f"{title}, {name}", lambda pair, m=metric, i=i: pair[i].metrics.get(m), form,
                   unit=unit)
            for title, metric, form, unit in _METRICS
            for i, name in enumerate(names)
        ),
        Column("KL less the other's", lambda pair: _difference(*pair), "+.4f"),
    ]  # fmt: skip
    lines = [
        f"# {names[0]} against {names[1]}",
        "",
        f"{len(pairs)} trials are in both; {len(ours.records) - len(pairs)} only in {names[0]}, "
        f"{len(other.records) - len(pairs)} only in {names[1]}. {_what_differs(pairs)}",
        "",
        table(columns, pairs),
    ]
    return "\n".join(lines) + "\n"


def _difference(left: Record, right: Record) -> Interval | None:
    """In pairs, where both have the same windows of the same text."""
    own_W, other_W = paired.kl_nats_W(left), paired.kl_nats_W(right)
    same = left.file_sha256.get("text") == right.file_sha256.get("text")
    windows = [(trial(r).sizes.windows, trial(r).sizes.context) for r in (left, right)]
    if own_W is None or other_W is None or not same or windows[0] != windows[1]:
        return None
    return paired.difference(own_W, other_W)


def _what_differs(pairs: list[tuple[Record, Record]]) -> str:
    left, right = pairs[0]
    found = []
    for part in ("inputs", "sizes"):
        one, two = (getattr(trial(record), part) for record in (left, right))
        found += [
            f"{part}.{f.name} is {getattr(one, f.name)!r} and {getattr(two, f.name)!r}"
            for f in fields(one)
            if getattr(one, f.name) != getattr(two, f.name)
        ]
    for name in ("revision", "device"):
        one, two = getattr(left, name), getattr(right, name)
        found += [f"{name} is {one} and {two}"] if one != two else []
    for name in sorted(left.file_sha256.keys() & right.file_sha256.keys()):
        found += [f"the hash of {name} differs"] * (
            left.file_sha256[name] != right.file_sha256[name]
        )
    return (
        f"They differ: {'; '.join(found)}." if found else "Inputs, sizes and device are the same."
    )
