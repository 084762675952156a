"""What the quality frontier says of encoders, as text: alone, under plans, by text, and twice over.

Owns the tables of encoders at the same bytes, of what encoder and middle tier are worth under a
plan, of the calibration text, and the section on compounding error.
"""

from __future__ import annotations

from hobbit_jax import markdown
from hobbit_jax.report.frontier_results import BEST_METHOD, FrontierResults, text_name
from hobbit_jax.report.results import NATIVE, UNIFORM

_KL = "{:.4f}"
_DIFFERENCE = "{:+.4f}"


def render_encoders(frontier: FrontierResults) -> list[str]:
    """Lines of the table of uniform quants by encoder."""
    order = ("rtn", "importance", "ggml", BEST_METHOD)
    native = [m for m in frontier.measured if m.plan.signal == NATIVE]
    uniform = [*native, *frontier.uniform]
    uniform.sort(key=lambda m: (-m.bytes_of_native, m.plan.formats, order.index(m.plan.method)))
    rows = []
    for m in uniform:
        tier = (m.rows[0].get("tiers") or [{}])[0]
        rows.append(
            (
                NATIVE if m.plan.signal == NATIVE else f"{m.plan.formats[0]}, {m.plan.method}",
                f"×{m.bytes_of_native:.2f}",
                markdown.interval(m.kl, _KL),
                markdown.number(m.mean("quality", "top1_agreement", "value"), "{:.3f}"),
                markdown.number(m.mean("quality", "perplexity", "value"), "{:.3f}"),
                markdown.number(tier.get("weight_error"), "{:.3f}"),
                markdown.number(tier.get("output_error"), "{:.3f}"),
                markdown.interval(m.task("arithmetic")),
                markdown.interval(m.task("functions")),
            )
        )
    head = (
        "experts", "bytes", "KL", "top-1", "perplexity", "weight error", "output error",
        "arithmetic", "functions",
    )  # fmt: skip
    return [
        "rtn sees no calibration. importance weighs each column by its second moment, ggml is "
        f"llama.cpp's encoder given the same, and {BEST_METHOD} minimises the error of the output "
        "under the whole second moment. Errors are roots of the share of energy lost, of weights "
        "and, on calibration tokens, of expert outputs times router weights.",
        "",
        *markdown.table(head, rows),
    ]


def render_ablation(frontier: FrontierResults) -> list[str]:
    """Lines on plans of plain encoders or of one low tier, each less its twin of the main study."""
    rows = []
    for m in frontier.measured:
        plan = m.plan
        other_text = plan.calibration_text or plan.encoder_text
        if plan.bytes_fraction is None or other_text or m in frontier.mixed:
            continue
        twin = frontier.main_study(plan.signal, plan.bytes_fraction)
        difference = frontier.difference(m, twin) if twin else None
        rows.append(
            (
                f"{100 * plan.bytes_fraction:g} %",
                plan.signal,
                f"{' and '.join(plan.formats)}, {plan.method}",
                markdown.interval(m.kl, _KL),
                markdown.interval(difference, _DIFFERENCE),
                markdown.relation(difference),
            )
        )
    if not rows:
        return []
    rows.sort()
    return [
        "The same limits with plainly encoded tiers, and with the lowest tier alone, less the plan "
        "of the table above with the same signal and seed.",
        "",
        *markdown.table(("bytes", "signal", "tiers", "KL", "difference", "it loses"), rows),
    ]


def render_texts(frontier: FrontierResults) -> list[str]:
    """Lines on plans whose tiers and signal come from another text, beside their twins."""
    rows = []
    for m in frontier.measured:
        if not m.plan.encoder_text:
            continue
        own = frontier.own_text_twin(m)
        difference = frontier.difference(m, own) if own else None
        limit = m.plan.bytes_fraction
        what = m.plan.signal if limit else f"{UNIFORM} {m.plan.formats[0]}"
        rows.append(
            (
                f"×{m.bytes_of_native:.2f}",
                what,
                text_name(m.plan.encoder_text),
                markdown.interval(own and own.kl, _KL),
                markdown.interval(m.kl, _KL),
                markdown.interval(difference, _DIFFERENCE),
                *(
                    markdown.interval(plan.task(task) if plan else None)
                    for task in ("arithmetic", "functions")
                    for plan in (own, m)
                ),
            )
        )
    if not rows:
        return []
    head = (
        "bytes", "plan", "text", "KL, own text", "KL, this text", "difference",
        "arithmetic, own", "arithmetic, this", "functions, own", "functions, this",
    )  # fmt: skip
    return [
        "Tiers encoded, and signals measured, on the sweep's own text and on another one: "
        "*mixed* is half source code, half problems of the tasks' training split. KL is on source "
        "code; the tasks show what it does not see.",
        "",
        *markdown.table(head, rows),
    ]


def render_compounding(frontier: FrontierResults) -> list[str]:
    """Lines of the section on quantising what is quantised already; the original is native."""
    rows = []
    plans = [m for m in frontier.measured if m.plan.signal == UNIFORM]
    for m in plans:
        straight = next(
            (
                other
                for other in plans
                if (other.plan.formats, other.plan.method) == (m.plan.formats, m.plan.method)
                and not other.plan.through
            ),
            None,
        )
        difference = frontier.difference(m, straight) if straight and m.plan.through else None
        tier = (m.rows[0].get("tiers") or [{}])[0]
        rows.append(
            (
                " → ".join(["original", *m.plan.through, m.plan.formats[0]]),
                m.plan.method,
                markdown.number(tier.get("weight_error"), "{:.4f}"),
                markdown.number(tier.get("output_error"), "{:.4f}"),
                markdown.interval(m.kl, _KL),
                markdown.interval(difference, _DIFFERENCE),
                markdown.relation(difference) if difference else markdown.ABSENT,
                markdown.number(m.mean("quality", "perplexity", "value"), "{:.3f}"),
                markdown.interval(m.task("arithmetic")),
                markdown.interval(m.task("functions")),
            )
        )
    head = (
        "way", "encoder", "weight error", "output error", "KL", "less the straight way",
        "it loses", "perplexity", "arithmetic", "functions",
    )  # fmt: skip
    return [
        f"On {frontier.tokens:,} held-out tokens. Errors, KL and differences are against the "
        "original weights; formats on the way are encoded plainly. A calibrated encoder works "
        "with calibration of the original.",
        "",
        *markdown.table(head, rows),
    ]
