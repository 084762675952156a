"""What the quality frontier says of signals, as text: at equal bytes, controlled, transferred.

Owns the order of "Which signal" of the decision document as far as it rests on `FrontierCell` rows.
The comparisons are `frontier_results.py`'s, what concerns encoders is said by `encoders.py`.
"""

from __future__ import annotations

import itertools

from hobbit_jax import markdown
from hobbit_jax.report.encoders import render_ablation, render_encoders, render_texts
from hobbit_jax.report.frontier_results import (
    BEST_METHOD,
    FrontierResults,
    Measured,
    text_name,
    tier_overlap,
)
from hobbit_jax.report.results import NATIVE, RANDOM, UNIFORM

FIGURE = "frontier.png"
_KL = "{:.4f}"
_DIFFERENCE = "{:+.4f}"


def _ratio(left: Measured, right: Measured) -> str:
    return f"×{left.kl.value / right.kl.value:.2f}" if right.kl.value > 0 else markdown.ABSENT


def render_signals(frontier: FrontierResults, drawn: set[str]) -> list[str]:
    """Lines below the heading of the section."""
    seeds = sorted({seed for m in frontier.measured for seed in m.seeds})
    lines = [
        f"Measured for quality alone, on {frontier.tokens:,} held-out tokens in "
        f"{frontier.windows} windows; seeds of the calibration windows: "
        f"{', '.join(map(str, seeds))}. Brackets are 95 % intervals over windows and seeds. "
        "Differences are taken within each window and seed, so they can be told from 0 where the "
        "intervals of the two plans overlap. KL is in nats a token, to the native model. Where a "
        "table gives no range over seeds, the plan was run with the first alone.",
        "",
        *_summary(frontier),
    ]
    if frontier.missing or frontier.failed:
        lines += [
            "",
            f"Of {len(frontier.sweep['cells'])} cells {frontier.missing} have no row and "
            f"{len(frontier.failed)} failed"
            + "".join(f"; {markdown.one_line(text)}" for text in frontier.failed)
            + ".",
        ]
    lines += markdown.figure(
        FIGURE,
        drawn,
        "KL against the bytes of all experts. Stars are uniform quants by their encoder; lines "
        "join those of one encoder. Crosses are the random control.",
    )
    for title, part in (
        ("Encoders at the same bytes", render_encoders(frontier)),
        ("Signals at the same bytes", _signals(frontier)),
        ("What the encoder and the middle tier are worth", render_ablation(frontier)),
        ("A tier for each selection", _selections(frontier)),
        ("Does a signal transfer?", _transfer(frontier)),
        ("What to calibrate on", render_texts(frontier)),
        ("How alike the signals are", _overlaps(frontier)),
    ):
        if part:
            lines += ["", f"### {title}", "", *part]
    return lines


def _summary(frontier: FrontierResults) -> list[str]:
    """The answer in three sentences, each from the rows."""
    lines = []
    uniform = {(m.plan.method, m.plan.formats[0]): m for m in frontier.uniform}
    for low in dict.fromkeys(low for _, low in uniform):
        best, ggml = uniform.get((BEST_METHOD, low)), uniform.get(("ggml", low))
        if best and ggml:
            lines.append(
                f"- **{low} with calibration** ({BEST_METHOD}) has {_ratio(best, ggml)} the KL of "
                f"llama.cpp's encoder under its importance matrix: "
                f"{markdown.interval(best.kl, _KL)} against {markdown.interval(ggml.kl, _KL)}, at "
                "the same bytes."
            )
    for fraction, mixed in itertools.groupby(frontier.mixed, lambda m: m.plan.bytes_fraction):
        signals = [m for m in mixed if m.plan.signal != RANDOM]
        control = frontier.main_study(RANDOM, fraction)
        if not signals or control is None:
            continue
        best = min(signals, key=lambda m: m.kl.value)
        against = frontier.difference(best, control)
        line = frontier.line(best, BEST_METHOD)
        text = (
            f"- **At {100 * (fraction or 0):g} % of native's bytes** the best signal is "
            f"{best.plan.signal}: {markdown.interval(best.kl, _KL)}, "
            f"{markdown.relation(against)} than the random control "
            f"({markdown.interval(against, _DIFFERENCE)})"
        )
        if line is not None:
            beyond = frontier.difference(best, line)
            mixing = frontier.difference(control, line)
            text += (
                f" and {markdown.relation(beyond)} than the uniform quants' line at these bytes "
                f"({markdown.interval(beyond, _DIFFERENCE)}); mixing at random is "
                f"{markdown.relation(mixing)} than that line "
                f"({markdown.interval(mixing, _DIFFERENCE)})"
            )
        lines.append(text + ".")
    for m in frontier.measured:
        own = (
            frontier.own_text_twin(m) if m.plan.encoder_text and m.plan.signal == UNIFORM else None
        )
        scores = [plan.task("arithmetic") for plan in (own, m) if plan]
        if own and all(scores):
            lines.append(
                f"- **The text decides too.** Calibrated on {text_name(m.plan.encoder_text)} "
                f"instead of its own text, uniform {m.plan.formats[0]} solves "
                f"{markdown.interval(scores[1])} of the arithmetic instead of "
                f"{markdown.interval(scores[0])}, at a KL of {markdown.interval(m.kl, _KL)} "
                f"instead of {markdown.interval(own.kl, _KL)}. KL on one text does not see that."
            )
    return lines


def _signals(frontier: FrontierResults) -> list[str]:
    mixed = frontier.mixed
    rows = []
    for m in mixed:
        random = frontier.main_study(RANDOM, m.plan.bytes_fraction)
        line = frontier.line(m, BEST_METHOD)
        against = frontier.difference(m, random) if random and random is not m else None
        beyond = frontier.difference(m, line) if line else None
        rows.append(
            (
                f"{100 * (m.plan.bytes_fraction or 0):g} %",
                m.plan.signal,
                markdown.interval(m.kl, _KL),
                markdown.interval(against, _DIFFERENCE) if against else markdown.ABSENT,
                markdown.relation(against) if against else "the control",
                markdown.interval(beyond, _DIFFERENCE) if beyond else markdown.ABSENT,
                markdown.relation(beyond),
                _seed_range(m),
                markdown.number(_bytes_per_selection(frontier, m), "×{:.2f}"),
                markdown.interval(m.task("arithmetic")),
            )
        )
    if not rows:
        return []
    head = (
        "bytes", "signal", "KL", "less random control", "it loses", "less uniform line",
        "it loses", "seeds", "bytes a selection", "arithmetic",
    )  # fmt: skip
    return [
        "Each signal shares out native, "
        f"{' and '.join(mixed[0].plan.formats)} under the same limit of bytes, by the same solver "
        "and the same cost of a format, so plans differ in nothing but who gets what. The uniform "
        f"line joins native and the uniform quants of the same encoder ({BEST_METHOD}). *seeds* is "
        "the least and the largest KL over calibration draws; *bytes a selection* what one use "
        "of an expert reads, over native's: a signal that sends hardly used experts low saves "
        "storage and little traffic.",
        "",
        *markdown.table(head, rows),
    ]


def _seed_range(m: Measured) -> str:
    means = m.kl_SW.mean(axis=1)
    return f"{means.min():.4f} to {means.max():.4f}" if len(means) > 1 else markdown.ABSENT


def _bytes_per_selection(frontier: FrontierResults, m: Measured) -> float | None:
    native = next((n for n in frontier.measured if n.plan.signal == NATIVE), None)
    own = m.mean("uses", "bytes_per_selection")
    base = native.mean("uses", "bytes_per_selection") if native else None
    return own / base if own and base else None


def _selections(frontier: FrontierResults) -> list[str]:
    rows = []
    for m in frontier.measured:
        if m.plan.shares is None:
            continue
        shares = [
            markdown.number(m.mean("uses", "skipped_share"), "{:.3f}"),
            markdown.number(_bytes_per_selection(frontier, m), "×{:.2f}"),
        ]
        tiers = [row["uses"]["tier_shares"] for row in m.rows]
        native = sum(tier[0] for tier in tiers) / len(tiers)
        rows.append(
            (
                m.plan.signal,
                " / ".join(f"{100 * share:g} %" for share in m.plan.shares),
                f"{native:.3f}",
                *shares,
                f"×{m.bytes_of_native:.2f}",
                markdown.interval(m.kl, _KL),
            )
        )
    if not rows:
        return []
    head = (
        "score", "shares asked for", "native", "skipped", "bytes a selection", "bytes stored", "KL",
    )  # fmt: skip
    return [
        "HOBBIT's way: each selection gets its tier by its router weight, or by the sum of the "
        "heavier weights of its token (cumulative_weight, with thresholds derived anew from the "
        "shares on calibration text). Shares are native / low / skipped. Such a plan stores both "
        "copies of every expert, so it does not compete for bytes stored but for bytes read.",
        "",
        *markdown.table(head, rows),
    ]


def _transfer(frontier: FrontierResults) -> list[str]:
    rows = []
    for m in frontier.measured:
        if not m.plan.calibration_text:
            continue
        own = frontier.main_study(m.plan.signal, m.plan.bytes_fraction)
        random = frontier.main_study(RANDOM, m.plan.bytes_fraction)
        loss = frontier.difference(m, own) if own else None
        against = frontier.difference(m, random) if random else None
        overlap = tier_overlap(m, own) if own else None
        rows.append(
            (
                f"{100 * (m.plan.bytes_fraction or 0):g} %",
                m.plan.signal,
                text_name(m.plan.calibration_text),
                markdown.interval(m.kl, _KL),
                markdown.interval(loss, _DIFFERENCE),
                markdown.interval(against, _DIFFERENCE),
                markdown.relation(against),
                f"{overlap[0]:.2f}, {overlap[1]:.2f}" if overlap else markdown.ABSENT,
            )
        )
    if not rows:
        return []
    head = (
        "bytes", "signal", "measured on", "KL", "less own text's", "less random control",
        "it loses", "same tier, rank correlation",
    )  # fmt: skip
    return [
        "The signal is measured on another text; experts are encoded by the sweep's own text, and "
        "quality is on the sweep's own evaluation text, which the other text does not resemble.",
        "",
        *markdown.table(head, rows),
    ]


def _overlaps(frontier: FrontierResults) -> list[str]:
    mixed = frontier.mixed
    if not mixed:
        return []
    fractions = sorted({m.plan.bytes_fraction or 0 for m in mixed})
    fraction = fractions[len(fractions) // 2]
    plans = [m for m in mixed if m.plan.bytes_fraction == fraction]
    rows = []
    for left in plans:
        cells = []
        for right in plans:
            overlap = None if left is right else tier_overlap(left, right)
            cells.append(f"{overlap[0]:.2f}, {overlap[1]:.2f}" if overlap else markdown.ABSENT)
        rows.append((left.plan.signal, *cells))
    return [
        f"At {100 * fraction:g} % of native's bytes: the share of (layer, expert) pairs that two "
        "signals put at the same tier, and Spearman's correlation of the tiers.",
        "",
        *markdown.table(("", *(m.plan.signal for m in plans)), rows),
    ]
