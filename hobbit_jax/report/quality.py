"""What each plan of a sweep costs in quality.

Owns section 3 of the decision document, and of section 4 what the sweep's own rows say of a signal:
against a random choice of as many, and against the uniform quants at the same bytes. The
comparisons are `comparisons.py`'s.
"""

from __future__ import annotations

from hobbit_jax import markdown
from hobbit_jax.report import figures
from hobbit_jax.report.comparisons import control_gap, line_gap
from hobbit_jax.report.results import RANDOM, Plan, Results, Row


def render_quality(results: Results, drawn: set[str]) -> list[str]:
    """Lines of section 3, with its figure if that was drawn."""
    tasks = sorted({name for row in results.rows for name in row.tasks})
    lines = [
        "## 3. Quality against total expert bytes",
        "",
        "Host bytes of all experts under each plan. Quality is the same at every budget, so each "
        "plan has one line. Brackets are 95 % intervals. KL is in nats a token.",
        "",
    ]
    if any(plan.residency for plan in results.plans):
        lines += [
            "A miss mode degrades what is missing when it is wanted, so its quality depends on "
            "the budget: it is measured on decoding one sequence at a time, on fewer tokens.",
            "",
        ]
    rows = []
    for plan in results.plans:
        row = results.quality_row(plan)
        if row is None:
            continue
        quality, native_bytes = row.quality, row.store.native_bytes if row.store else None
        ratio = row.plan_bytes / native_bytes if row.plan_bytes and native_bytes else None
        rows.append(
            (
                results.label(plan),
                markdown.mib(row.plan_bytes, 2),
                markdown.number(ratio, "×{:.2f}"),
                markdown.number(quality and quality.bits_per_byte, "{:.4f}"),
                markdown.interval(row.kl_mean, "{:.4f}"),
                markdown.interval(quality and quality.kl_p99, "{:.3f}"),
                markdown.interval(quality and quality.top1_agreement, "{:.3f}"),
                *(markdown.interval(row.tasks[t].score if t in row.tasks else None) for t in tasks),
            )
        )
    head = ("plan", "MiB", "of native", "bits per byte", "KL mean", "KL p99", "top-1", *tasks)
    lines += markdown.table(head, rows)
    return lines + markdown.figure(
        figures.NAMES[0],
        drawn,
        "KL against host bytes. Stars are uniform quants, joined by a dashed line; a mixed plan "
        "earns its complexity only below that line. Crosses are the random control; a larger "
        "mark is a larger share in the low format.",
    )


def render_against_control(results: Results) -> list[str]:
    """Lines of section 4 that rest on the sweep of the cache itself."""
    mixed = [plan for plan in results.plans if plan.is_mixed]
    gaps = [(plan, control_gap(plan, results)) for plan in mixed if plan.signal != RANDOM]
    gaps.sort(key=lambda pair: (pair[0].model, pair[0].low_format or "", pair[0].low_fraction))
    known = [gap for _, gap in gaps if gap]
    below = sum(gap.relation == "below" for gap in known)
    above = sum(gap.relation == "above" for gap in known)
    words = {
        "below": "below, intervals apart",
        "above": "above, intervals apart",
        "not separate": "intervals overlap",
    }
    rows = []
    for plan, gap in gaps:
        row = results.quality_row(plan)
        rows.append(
            (
                plan.low_format,
                _share(plan, row),
                results.label(plan),
                markdown.interval(row and row.kl_mean, "{:.4f}"),
                markdown.interval(gap and gap.control, "{:.4f}"),
                markdown.number(gap and gap.difference, "{:+.4f}"),
                words[gap.relation] if gap else markdown.ABSENT,
            )
        )
    lines = [
        f"{below} of {len(known)} comparisons put a signal's KL below the random control's with "
        f"the intervals apart, {above} above, {len(known) - below - above} cannot be told apart.",
        "",
        *markdown.table(
            ("low format", "share", "plan", "KL", "random control", "difference", "against random"),
            rows,
        ),
        "",
        "A share of selections (router_weight) and a share of layer-expert pairs (the others) "
        "are different amounts of degraded work: compare the degraded fraction in section 5. The "
        "share of a miss mode is that fraction, and its control a random choice of as many uses, "
        "on the straight line between the random plans, native and the uniform quant.",
        "",
        "Against the uniform quants at the same host bytes: the straight line between the two "
        "neighbouring plans of one precision.",
        "",
    ]
    rows = []
    for plan in mixed:
        row, gap = results.quality_row(plan), line_gap(plan, results)
        rows.append(
            (
                results.label(plan),
                markdown.mib(row and row.plan_bytes, 2),
                markdown.interval(row and row.kl_mean, "{:.4f}"),
                markdown.interval(gap.line, "{:.4f}"),
                gap.relation,
            )
        )
    head = ("plan", "MiB", "KL", "uniform line at these bytes", "mixed is")
    return lines + markdown.table(head, rows)


def _share(plan: Plan, row: Row | None) -> str:
    if not plan.residency:
        return f"{100 * plan.low_fraction:g} %"
    degraded = row.decode.degraded_fraction if row and row.decode else None
    return markdown.number(degraded and 100 * degraded, "{:.0f} %")
