"""Two sweeps side by side: the same trial in both, metric by metric.

Owns `scripts/report.py --against`. Trials pair by plan, budget and seed; what else differs (model,
texts, sizes, revision) is named on top, since it is what the comparison is about.
"""

from dataclasses import replace
from typing import Any

from hobbit_jax.record import Inputs, Record
from hobbit_jax.report import paired
from hobbit_jax.report.sweep import Sweep, at, trial
from hobbit_jax.report.table import MIB, Column, table
from hobbit_jax.statistics import Interval

_METRICS = (
    Column("KL mean", "kl_mean_nats", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("stored, MiB", "stored_bytes", ".2f", unit=MIB),
    Column("MiB moved a token", "bytes_moved_per_token", ".3f", unit=MIB),
    Column("hit rate", "hit_rate", ".3f"),
    Column("resident experts", "resident_experts", "d"),
    Column("first token, s", "first_token_s", ".3f"),
)


def render(ours: Sweep, other: Sweep, names: tuple[str, str]) -> str:
    """The comparison of two sweeps, called by these names, as Markdown.

    Raises:
        ValueError: no trial is in both.
    """
    sizes = trial(ours.records[0]).sizes

    def key(record: Record) -> object:
        return replace(trial(record), inputs=Inputs(), sizes=sizes, protected_fraction=0.0)

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
            replace(c, title=f"{c.title}, {name}", field=lambda pair, c=c, i=i: c.value(pair[i]))
            for c in _METRICS
            for i, name in enumerate(names)
        ),
        Column("KL less the other's", lambda pair: _difference(*pair), "+.4f"),
    ]
    one, two = map(_facts, pairs[0])
    differ = [f"{n} is {v} and {two[n]}" for n, v in one.items() if n in two and v != two[n]]
    said = (
        f"They differ: {'; '.join(differ)}." if differ else "Inputs, sizes and device are the same."
    )
    return (
        f"# {names[0]} against {names[1]}\n\n"
        f"{len(pairs)} trials are in both; {len(ours.records) - len(pairs)} only in {names[0]}, "
        f"{len(other.records) - len(pairs)} only in {names[1]}. {said}\n\n"
        f"{table(columns, pairs)}\n"
    )


def _difference(left: Record, right: Record) -> Interval | None:
    """In pairs, where both have the same windows of the same text."""
    own_W, other_W = paired.kl_nats_W(left), paired.kl_nats_W(right)
    texts = [r.file_sha256.get("text") for r in (left, right)]
    windows = [(trial(r).sizes.windows, trial(r).sizes.context) for r in (left, right)]
    if own_W is None or other_W is None or texts[0] != texts[1] or windows[0] != windows[1]:
        return None
    return paired.difference(own_W, other_W)


def _facts(record: Record) -> dict[str, Any]:
    """What a comparison may be about, by name."""
    asked = trial(record)
    return {
        **{f"inputs.{name}": repr(value) for name, value in vars(asked.inputs).items()},
        **{f"sizes.{name}": repr(value) for name, value in vars(asked.sizes).items()},
        "protected_fraction": asked.protected_fraction,
        "revision": record.revision,
        "device": record.device,
        **{f"sha256 of {name}": digest[:12] for name, digest in record.file_sha256.items()},
    }
