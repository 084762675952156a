"""Tables of the studies of quality alone: encoders, scores, texts, compounding.

Their titles and what a reader must know of them stand in `templates/frontier.md.j2`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath

from hobbit_jax.record import MixedInBytes, Native, PerSelection, Uniform
from hobbit_jax.report.frontier import ENCODERS, Averaged, Frontier, overlap
from hobbit_jax.report.sweep import RANDOM
from hobbit_jax.report.table import Column, percent, ratio, table
from hobbit_jax.report.verdict import relation
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


def _against(title: str, other: Callable[[Averaged], Interval | None]) -> list[Column]:
    words = {"below": "less", "above": "more"}

    def compared(averaged: Averaged) -> str | None:
        found = other(averaged)
        text = relation([found] if found else [])
        return words.get(text or "", text)

    return [Column(f"KL less {title}", other, "+.4f"), Column("that is", compared)]


def _of(frontier: Frontier, kind: type) -> Sequence[Averaged]:
    return [p for p in frontier.plans if isinstance(p.plan, kind)]


def encoders(frontier: Frontier) -> str:
    """Uniform quants by encoder."""
    columns = [
        Column("experts", lambda p: f"{p.formats[0]}, {p.encoder}" if p.formats else "native"),
        _STORED,
        _KL,
        Column("top-1", lambda p: p.mean("top1_agreement"), ".3f"),
        _PERPLEXITY,
        Column("weight error", lambda p: p.records[0].metrics.get("weight_error"), ".3f"),
        Column("output error", lambda p: p.records[0].metrics.get("output_error"), ".3f"),
        *_TASKS,
    ]
    plans = [*_of(frontier, Native), *frontier.uniform]
    plans.sort(key=lambda p: (-p.bytes_of_native, p.formats, ENCODERS.index(p.encoder)))
    return table(columns, plans)


def _control(frontier: Frontier) -> list[Column]:
    def less_random(p: Averaged) -> Interval | None:
        return frontier.difference(p, frontier.main_plan(RANDOM, p.limit))

    return _against("random", less_random)


def scores(frontier: Frontier) -> str:
    """Mixes by importance score."""
    columns = [
        _LIMIT,
        _SCORE,
        _KL,
        *_control(frontier),
        *_against("uniform line", lambda p: frontier.difference(p, frontier.line(p))),
        Column("seeds", "seed_range"),
        Column("read, of native", lambda p: ratio(frontier.bytes_read(p))),
        *_TASKS[:1],
    ]
    return table(columns, frontier.mixed)


def ablation(frontier: Frontier) -> str:
    """Mixes without the calibrated encoder, or without the middle format."""

    def twin(p: Averaged) -> Interval | None:
        return frontier.difference(p, frontier.main_plan(p.score, p.limit))

    plans = [
        p
        for p in _of(frontier, MixedInBytes)
        if p.text == frontier.own_text
        and p not in frontier.mixed
        and not getattr(p.plan, "score_text", "")
    ]
    plans.sort(key=lambda p: (p.limit or 0, p.score, p.formats, p.encoder))
    formats = Column("formats", lambda p: f"{' and '.join(p.formats)}, {p.encoder}")
    return table([_LIMIT, _SCORE, formats, _KL, *_against("the whole plan", twin)], plans)


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
    return table(columns, _of(frontier, PerSelection))


def _alike(found: tuple[float, float] | None) -> str | None:
    return None if found is None else f"{found[0]:.2f}, {found[1]:.2f}"


def _text_name(text: str) -> str:
    """How a text is called: it is given by its path, or empty for the shipped one."""
    return PurePath(text).name or "the study's own"


def transfer(frontier: Frontier) -> str:
    """Mixes whose score was measured on another text."""

    def own(p: Averaged) -> Averaged | None:
        return frontier.main_plan(p.score, p.limit)

    columns = [
        _LIMIT,
        _SCORE,
        Column("measured on", lambda p: _text_name(p.plan.score_text)),
        _KL,
        Column("less own text's", lambda p: frontier.difference(p, own(p)), "+.4f"),
        *_control(frontier),
        Column("alike", lambda p: _alike(overlap(p, own(p)))),
    ]
    return table(columns, [p for p in frontier.plans if getattr(p.plan, "score_text", "")])


def texts(frontier: Frontier) -> str:
    """Plans calibrated on another text, beside the same on the study's own."""

    def own(p: Averaged) -> Averaged | None:
        wanted = p.plan, frontier.own_text
        return next((other for other in frontier.plans if (other.plan, other.text) == wanted), None)

    def tasks(name: str) -> list[Column]:
        return [
            Column(f"{name}, own text", lambda p: twin.task(name) if (twin := own(p)) else None,
                   ".2f"),
            Column(f"{name}, this text", lambda p: p.task(name), ".2f"),
        ]  # fmt: skip

    columns = [
        _STORED,
        Column("plan", lambda p: p.score if p.limit else f"uniform {p.formats[0]}"),
        Column("text", lambda p: _text_name(p.text)),
        Column("KL, own text", lambda p: twin.kl if (twin := own(p)) else None, ".4f"),
        Column("KL, this text", "kl", ".4f"),
        Column("difference", lambda p: frontier.difference(p, own(p)), "+.4f"),
        *tasks("arithmetic"),
        *tasks("functions"),
    ]
    others = [p for p in frontier.plans if p.text != frontier.own_text]
    return table(columns, [p for p in others if not isinstance(p.plan, Native)])


def overlaps(frontier: Frontier) -> str:
    """How alike the scores' plans are at the middle limit of bytes."""
    limits = sorted({p.limit or 0 for p in frontier.mixed})
    plans = [p for p in frontier.mixed if p.limit == limits[len(limits) // 2]]

    def beside(other: Averaged) -> Column:
        return Column(
            other.score, lambda p: None if p is other else _alike(overlap(p, other))
        )  # of itself there is nothing to say

    return table([_SCORE, *map(beside, plans)], plans)


def compounding(frontier: Frontier) -> str:
    """Uniform quants straight from the original and by way of another format."""
    plans = _of(frontier, Uniform)

    def straight(p: Averaged) -> Interval | None:
        if not p.through:
            return None
        same = [q for q in plans if (q.formats, q.encoder) == (p.formats, p.encoder)]
        return frontier.difference(p, next((q for q in same if not q.through), None))

    columns = [
        Column("way", lambda p: " → ".join(["original", *p.through, p.formats[0]])),
        Column("encoder", "encoder"),
        Column("weight error", lambda p: p.mean("weight_error"), ".4f"),
        Column("output error", lambda p: p.mean("output_error"), ".4f"),
        _KL,
        *_against("the straight way", straight),
        _PERPLEXITY,
        *_TASKS,
    ]
    return table(columns, plans)
