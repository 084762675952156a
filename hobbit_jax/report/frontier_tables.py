"""Tables of the studies of quality alone: encoders, scores, texts, compounding."""

from __future__ import annotations

from collections.abc import Callable

from hobbit_jax.record import MixedInBytes, Native, PerSelection, Uniform
from hobbit_jax.report.frontier import (
    BEST_ENCODER,
    ENCODERS,
    Averaged,
    Frontier,
    overlap,
    text_name,
)
from hobbit_jax.report.sweep import RANDOM
from hobbit_jax.report.table import Column, percent, ratio, table
from hobbit_jax.statistics import Interval

_KL = Column("KL", "kl", ".4f")
_TASKS = [
    Column("arithmetic", lambda p: p.task("arithmetic"), ".2f"),
    Column("functions", lambda p: p.task("functions"), ".2f"),
]
_ERRORS = [
    Column("weight error", lambda p: p.records[0].metrics.get("weight_error"), ".3f"),
    Column("output error", lambda p: p.records[0].metrics.get("output_error"), ".3f"),
]
_LIMIT = Column("bytes", lambda p: percent(p.limit or 0))
_SCORE = Column("score", "score")


def relation(difference: Interval | None) -> str | None:
    """Whether the interval of a difference lies below 0, above, or on both sides."""
    if difference is None:
        return None
    if difference.high < 0:
        return "less"
    return "more" if difference.low > 0 else "not told apart"


def _against(title: str, other: Callable[[Averaged], Interval | None]) -> list[Column]:
    return [
        Column(f"KL less {title}", other, "+.4f"),
        Column("that is", lambda p: relation(other(p))),
    ]


def sections(frontier: Frontier) -> list[tuple[str, str, str]]:
    """(title, text, table) of what a frontier shows; those without a row are left out."""
    if any(p.through for p in frontier.plans):
        return [("Compounding error", _ABOUT_COMPOUNDING, _compounding(frontier))]
    found = [
        ("Encoders at the same bytes", _ABOUT_ENCODERS, _encoders(frontier)),
        ("Importance scores at the same bytes", _ABOUT_SCORES, _scores(frontier)),
        ("What the encoder and the middle format are worth", _ABOUT_ABLATION, _ablation(frontier)),
        ("A precision for each selection", _ABOUT_SELECTIONS, _selections(frontier)),
        ("Does a score transfer to another text?", _ABOUT_TRANSFER, _transfer(frontier)),
        ("What to calibrate on", _ABOUT_TEXTS, _texts(frontier)),
        ("How alike the scores are", _ABOUT_OVERLAP, _overlaps(frontier)),
    ]
    return [section for section in found if section[2]]


_ABOUT_ENCODERS = (
    "`rtn` sees no calibration. `importance` weighs each column by its second moment, `ggml` is "
    f"llama.cpp's encoder given the same, and `{BEST_ENCODER}` is GPTQ with refinement: it "
    "minimises the error of the output under the whole second moment. Errors are roots of the "
    "share of energy lost, of weights and of expert outputs times router weights."
)


def _encoders(frontier: Frontier) -> str:
    native = [p for p in frontier.plans if isinstance(p.plan, Native)]
    columns = [
        Column("experts", lambda p: f"{p.formats[0]}, {p.encoder}" if p.formats else "native"),
        Column("stored, of native", lambda p: ratio(p.bytes_of_native)),
        _KL,
        Column("top-1", lambda p: p.mean("top1_agreement"), ".3f"),
        Column("perplexity", lambda p: p.mean("perplexity"), ".3f"),
        *_ERRORS,
        *_TASKS,
    ]
    plans = [*native, *frontier.uniform]
    plans.sort(key=lambda p: (-p.bytes_of_native, p.formats, ENCODERS.index(p.encoder)))
    return table(columns, plans)


_ABOUT_SCORES = (
    "Each score shares out native and the low formats under the same limit of bytes, by the same "
    "solver and the same cost of a format. The uniform line joins native and the uniform quants "
    f"of the same encoder ({BEST_ENCODER}). *Seeds* is the least and the largest KL over "
    "calibration draws. *Read* is what one use of an expert reads, over native's: a score that "
    "keeps much-used experts native saves storage and little traffic, so compare scores by it."
)


def _scores(frontier: Frontier) -> str:
    def control(p: Averaged) -> Interval | None:
        return frontier.difference(p, frontier.main_plan(RANDOM, p.limit))

    def line(p: Averaged) -> Interval | None:
        return frontier.difference(p, frontier.line(p))

    columns = [
        _LIMIT,
        _SCORE,
        _KL,
        *_against("random", control),
        *_against("uniform line", line),
        Column("seeds", "seed_range"),
        Column("read, of native", lambda p: ratio(frontier.bytes_read(p))),
        *_TASKS[:1],
    ]
    return table(columns, frontier.mixed)


_ABOUT_ABLATION = (
    "Ablation: the same limits with plainly encoded experts, and with the lowest format alone, "
    "less the plan of the table above with the same score and seed."
)


def _ablation(frontier: Frontier) -> str:
    def twin(p: Averaged) -> Interval | None:
        return frontier.difference(p, frontier.main_plan(p.score, p.limit))

    own = [p for p in frontier.plans if p.text == frontier.own_text and p not in frontier.mixed]
    plans = [p for p in own if isinstance(p.plan, MixedInBytes) and not p.plan.score_text]
    plans.sort(key=lambda p: (p.limit or 0, p.score, p.formats, p.encoder))
    formats = Column("formats", lambda p: f"{' and '.join(p.formats)}, {p.encoder}")
    return table([_LIMIT, _SCORE, formats, _KL, *_against("the whole plan", twin)], plans)


_ABOUT_SELECTIONS = (
    "HOBBIT's way: each selection gets its precision by its router weight, or by the sum of the "
    "heavier weights of its token (cumulative_weight). Shares are native / low / skipped. Such a "
    "plan stores both copies of every expert, so it competes for bytes read, not for bytes stored."
)


def _selections(frontier: Frontier) -> str:
    def native_share(p: Averaged) -> float:
        return sum(r.samples["precision_shares"][0] for r in p.records) / len(p.records)

    columns = [
        _SCORE,
        Column("shares asked for", lambda p: " / ".join(percent(s) for s in p.plan.shares)),
        Column("native", native_share, ".3f"),
        Column("skipped", lambda p: p.mean("skipped_share"), ".3f"),
        Column("read, of native", lambda p: ratio(frontier.bytes_read(p))),
        Column("stored, of native", lambda p: ratio(p.bytes_of_native)),
        _KL,
    ]
    return table(columns, [p for p in frontier.plans if isinstance(p.plan, PerSelection)])


_ABOUT_TRANSFER = (
    "The score was measured on another text; experts are encoded by the study's own text, and "
    "quality is on its own evaluation text, which the other text does not resemble. *Alike* is "
    "the share of experts at one precision and Spearman's correlation with the own text's plan."
)


def _alike(found: tuple[float, float] | None) -> str | None:
    return None if found is None else f"{found[0]:.2f}, {found[1]:.2f}"


def _transfer(frontier: Frontier) -> str:
    def own(p: Averaged) -> Averaged | None:
        return frontier.main_plan(p.score, p.limit)

    def control(p: Averaged) -> Interval | None:
        return frontier.difference(p, frontier.main_plan(RANDOM, p.limit))

    columns = [
        _LIMIT,
        _SCORE,
        Column("measured on", lambda p: text_name(p.plan.score_text)),
        _KL,
        Column("less own text's", lambda p: frontier.difference(p, own(p)), "+.4f"),
        *_against("random", control),
        Column("alike", lambda p: _alike(overlap(p, own(p)))),
    ]
    return table(columns, [p for p in frontier.plans if getattr(p.plan, "score_text", "")])


_ABOUT_TEXTS = (
    "Experts encoded, and scores measured, on the study's own text and on another one: *mixed* is "
    "half source code, half problems of the tasks' training split. KL is on source code; the "
    "tasks show what it does not see."
)


def _texts(frontier: Frontier) -> str:
    def own(p: Averaged) -> Averaged | None:
        return frontier.own_text_twin(p)

    def own_task(name: str) -> Callable[[Averaged], Interval | None]:
        return lambda p: twin.task(name) if (twin := own(p)) else None

    columns = [
        Column("stored, of native", lambda p: ratio(p.bytes_of_native)),
        Column("plan", lambda p: p.score if p.limit else f"uniform {p.formats[0]}"),
        Column("text", lambda p: text_name(p.text)),
        Column("KL, own text", lambda p: twin.kl if (twin := own(p)) else None, ".4f"),
        Column("KL, this text", "kl", ".4f"),
        Column("difference", lambda p: frontier.difference(p, own(p)), "+.4f"),
        Column("arithmetic, own text", own_task("arithmetic"), ".2f"),
        Column("arithmetic, this text", lambda p: p.task("arithmetic"), ".2f"),
        Column("functions, own text", own_task("functions"), ".2f"),
        Column("functions, this text", lambda p: p.task("functions"), ".2f"),
    ]
    others = [p for p in frontier.plans if p.text != frontier.own_text]
    return table(columns, [p for p in others if not isinstance(p.plan, Native)])


_ABOUT_OVERLAP = (
    "At the middle limit of bytes: the share of (layer, expert) pairs that two scores put at the "
    "same precision, and Spearman's correlation of the precisions."
)


def _overlaps(frontier: Frontier) -> str:
    limits = sorted({p.limit or 0 for p in frontier.mixed})
    plans = [p for p in frontier.mixed if p.limit == limits[len(limits) // 2]]

    def with_(other: Averaged) -> Callable[[Averaged], str | None]:
        return lambda p: None if p is other else _alike(overlap(p, other))

    return table([_SCORE, *(Column(other.score, with_(other)) for other in plans)], plans)


_ABOUT_COMPOUNDING = (
    "What it costs to quantise an already quantised expert. Errors, KL and differences are "
    "against the original weights; formats on the way are encoded plainly. A calibrated encoder "
    "works with calibration of the original."
)


def _compounding(frontier: Frontier) -> str:
    plans = [p for p in frontier.plans if isinstance(p.plan, Uniform)]

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
        Column("perplexity", lambda p: p.mean("perplexity"), ".3f"),
        *_TASKS,
    ]
    return table(columns, plans)
