"""Tables of the studies of quality alone: encoders, scores, texts, compounding.

Their titles and what a reader must know of them stand in `templates/frontier.md.j2`.
"""

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from hobbit_jax.record import MixedInBytes, Native, PerSelection, QualityTrial, Record, Uniform
from hobbit_jax.report.frontier import ENCODERS, Averaged, Frontier
from hobbit_jax.report.paired import mcnemar, relation, task_loss
from hobbit_jax.report.sweep import RANDOM, scored_tasks
from hobbit_jax.report.table import Column, listed, percent, ratio, table
from hobbit_jax.statistics import Interval

_KL = Column("KL", "kl", ".4f")
_TASKS = [
    Column("arithmetic", lambda p: p.task("arithmetic"), ".2f"),
    Column("functions", lambda p: p.task("functions"), ".2f"),
]
_LIMIT = Column("bytes", lambda p: percent(p.limit or 0))
_SCORE = Column("score", "score")
_STORED = Column("stored, of native", lambda p: ratio(p.bytes_of_native))
_PERPLEXITY = Column("perplexity", lambda p: p.mean("perplexity"), ".3f")


def _against(
    frontier: Frontier, title: str, other: Callable[[Averaged], Averaged | None]
) -> list[Column]:
    words = {"below": "less", "above": "more"}

    def less(averaged: Averaged) -> Interval | None:
        return frontier.difference(averaged, other(averaged))

    def compared(averaged: Averaged) -> str | None:
        text = relation(less(averaged))
        return words.get(text or "", text)

    return [Column(f"KL less {title}", less, "+.4f"), Column("that is", compared)]


def _named(plan: Any) -> str:
    if isinstance(plan, Native):
        return "native"
    roles = f", {listed(plan.roles)} alone" if plan.roles else ""
    return f"{plan.format}, {plan.encoder}{roles}"


def _rows(frontier: Frontier) -> list[Averaged]:
    """Native and the uniform quants straight from it, the largest first."""
    parts = [p for p in frontier.plans_of(Uniform, frontier.own_text) if p.roles]
    plans = [*frontier.plans_of(Native), *frontier.uniform, *parts]
    return sorted(plans, key=lambda p: (-p.bytes_of_native, p.formats, ENCODERS.index(p.encoder)))


def problems(frontier: Frontier) -> str:
    """Problems of lm-eval's tasks solved by each plan, beside native and ggml's best."""
    found = frontier.scored
    native = found.get(Native())
    of_ggml = [r for plan, r in found.items() if getattr(plan, "encoder", "") == "ggml"]

    def named(record: Record) -> str:
        assert isinstance(record.asked, QualityTrial)
        return _named(record.asked.plan)

    def stored(record: Record, of: str = "stored_bytes") -> float:
        return record.metrics.get(of) or 0

    def solved_less(task: str) -> Callable[[Record], Interval | None]:
        return lambda r: None if native is None or r is native else task_loss(r, native, task)

    def beside_ggml(task: str) -> Callable[[Record], str | None]:
        def compared(record: Record) -> str | None:
            rivals = [rival for rival in of_ggml if stored(rival) <= stored(record)]
            if record is native or record in of_ggml or not rivals:
                return None
            best = max(rivals, key=lambda rival: stored(rival, task))
            split = mcnemar(record, best, task)
            return split and f"{named(best)}: {split[0]} to {split[1]}, p {split[2]:.2f}"

        return compared

    columns = [
        Column("feed-forward matrices", named),
        Column("stored, of native", lambda r: ratio(stored(r) / stored(r, "native_bytes"))),
    ]
    for name in scored_tasks(found.values()):
        task = f"task_{name}"
        columns += [
            Column(name, task, ".3f", interval=True),
            Column("solved less than native", solved_less(task), "+.3f"),
            Column("solved by it alone, to ggml's best alone", beside_ggml(task)),
        ]
    return table(columns, sorted(found.values(), key=lambda r: (-stored(r), named(r))))


def by_text(frontiers: Sequence[Frontier]) -> str:
    """One study on all of its evaluation texts: KL, and beside ggml's best of no more bytes."""

    def on(frontier: Frontier, field: Callable[[Averaged], Any]) -> Callable[[Averaged], Any]:
        return lambda p: (own := frontier.by_plan.get((p.plan, p.text))) and field(own)

    columns = [Column("feed-forward matrices", lambda p: _named(p.plan)), _STORED]
    for title, form, field in (
        ("KL", ".3f", lambda frontier: lambda p: p.kl),
        ("perplexity", ".2f", lambda frontier: lambda p: p.mean("perplexity")),
        ("KL over ggml's best", ".2f", lambda frontier: frontier.over_ggml),
    ):
        columns += [Column(f"{title}, {f.text_name}", on(f, field(f)), form) for f in frontiers]
    return table(columns, _rows(frontiers[0]))


def encoders(frontier: Frontier) -> str:
    """Uniform quants by encoder."""

    def rival(p: Averaged) -> str | None:
        found = frontier.best_of_ggml(p)
        return found.formats[0] if found and frontier.over_ggml(p) else None

    columns = [
        Column("experts", lambda p: _named(p.plan)),
        _STORED,
        _KL,
        Column("top-1", lambda p: p.mean("top1_agreement"), ".3f"),
        _PERPLEXITY,
        Column("ggml's best of no more bytes", rival),
        Column("KL over its KL", frontier.over_ggml, ".2f"),
        *_TASKS,
    ]
    return table(columns, _rows(frontier))


def _control(frontier: Frontier) -> list[Column]:
    return _against(frontier, "random", lambda p: frontier.like(p, score=RANDOM, score_text=""))


def scores(frontier: Frontier) -> str:
    """Mixes by importance score."""
    columns = [
        _LIMIT,
        _SCORE,
        _KL,
        *_control(frontier),
        *_against(frontier, "uniform line", frontier.line),
        Column("seeds", "seed_range"),
        Column("read, of native", lambda p: ratio(frontier.bytes_read(p))),
        *_TASKS[:1],
    ]
    return table(columns, frontier.mixed)


def ablation(frontier: Frontier) -> str:
    """Mixes without the calibrated encoder, or without the middle format."""
    varied = [p for p in frontier.plans_of(MixedInBytes, frontier.own_text) if not p.score_text]
    plans = [p for p in varied if p not in frontier.mixed]
    plans.sort(key=lambda p: (p.limit or 0, p.score, p.formats, p.encoder))
    columns = [
        _LIMIT,
        _SCORE,
        Column("formats", lambda p: f"{' and '.join(p.formats)}, {p.encoder}"),
        _KL,
        *_against(frontier, "the whole plan", lambda p: frontier.like(p, **frontier.whole)),
    ]
    return table(columns, plans)


def selections(frontier: Frontier) -> str:
    """Plans that give each selection its precision."""

    def native_share(p: Averaged) -> float:
        return sum(r.samples["precision_shares"][0] for r in p.records) / len(p.records)

    columns = [
        _SCORE,
        Column("shares asked for", lambda p: " / ".join(percent(s) for s in p.plan.shares)),
        Column("native", native_share, ".3f"),
        Column("skipped", lambda p: p.mean("skipped_share"), ".3f"),
        Column("read, of native", lambda p: ratio(frontier.bytes_read(p))),
        _STORED,
        _KL,
    ]
    return table(columns, frontier.plans_of(PerSelection))


def _text_name(text: str) -> str:
    """How a text is called: it is given by its path, or empty for the shipped one."""
    return PurePath(text).name or "the study's own"


def transfer(frontier: Frontier) -> str:
    """Mixes whose score was measured on another text."""

    def less_own(p: Averaged) -> Interval | None:
        return frontier.difference(p, frontier.like(p, score_text=""))

    columns = [
        _LIMIT,
        _SCORE,
        Column("measured on", lambda p: _text_name(p.score_text)),
        _KL,
        Column("less own text's", less_own, "+.4f"),
        *_control(frontier),
    ]
    return table(columns, [p for p in frontier.plans if p.score_text])


def texts(frontier: Frontier) -> str:
    """Plans calibrated on another text, beside the same on the study's own."""

    def own(p: Averaged) -> Averaged | None:
        return frontier.like(p, frontier.own_text)

    def both(title: str, field: Callable[[Averaged], Interval | None], form: str) -> list[Column]:
        return [
            Column(f"{title}, own text", lambda p: (twin := own(p)) and field(twin), form),
            Column(f"{title}, this text", field, form),
        ]

    columns = [
        _STORED,
        Column("plan", lambda p: p.score if p.limit else f"uniform {p.formats[0]}"),
        Column("text", lambda p: _text_name(p.text)),
        *both("KL", lambda p: p.kl, ".4f"),
        Column("difference", lambda p: frontier.difference(p, own(p)), "+.4f"),
        *both("arithmetic", lambda p: p.task("arithmetic"), ".2f"),
        *both("functions", lambda p: p.task("functions"), ".2f"),
    ]
    others = [p for p in frontier.plans if p.text != frontier.own_text]
    return table(columns, [p for p in others if not isinstance(p.plan, Native)])


def compounding(frontier: Frontier) -> str:
    """Uniform quants straight from the original and by way of another format."""
    columns = [
        Column("way", lambda p: " → ".join(["original", *p.through, p.formats[0]])),
        Column("encoder", "encoder"),
        _KL,
        *_against(frontier, "the straight way", lambda p: frontier.like(p, through=())),
        _PERPLEXITY,
        *_TASKS,
    ]
    return table(columns, frontier.plans_of(Uniform))
