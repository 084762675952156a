"""What each plan of a sweep costs at equal pool bytes: residents, hits, bytes moved, tokens/s.

Owns section 5 of the decision document.
"""

from __future__ import annotations

from hobbit_jax import markdown
from hobbit_jax.report import figures
from hobbit_jax.report.comparisons import bound_tokens_per_second, compare_speed
from hobbit_jax.report.results import NATIVE, Results, Row, Setting
from hobbit_jax.report.verdict import Rule


def render_cost(results: Results, rule: Rule, drawn: set[str]) -> list[str]:
    """Lines of section 5, with its figures if they were drawn."""
    lines = [
        "## 5. Cost at equal pool bytes",
        "",
        "Every plan gets the same pool bytes, native with the SLRU cache included. Tokens/s are "
        "the median of the repeats with minimum and maximum, and are compared only on one "
        "device; two timings whose ranges touch are called equal. The bound is a prediction from "
        f"a model, not a measurement: for the {markdown.one_line(rule.card)}, "
        f"1 / max(expert bytes used a token ÷ {rule.device_gb_s:g} GB/s, "
        f"bytes moved a token ÷ {rule.pcie_gb_s:g} GB/s). It leaves out dense layers, "
        "attention, compute and latency.",
    ]
    for setting in results.settings:
        lines += ["", f"### Budget {results.setting_label(setting)}", ""]
        lines += _cost_table(results, rule, setting)
    shown = "native, the uniform quants, each verdict's best candidate and its random control"
    lines += markdown.figure(
        figures.NAMES[1],
        drawn,
        f"Bytes moved and tokens/s against the budget, for {shown}. The tables have every plan.",
    )
    return lines + markdown.figure(
        figures.NAMES[2],
        drawn,
        "How unequally experts are used (native routing). The nearer to the dotted line, the "
        "less a cache of hot experts can gain.",
    )


def _cost_table(results: Results, rule: Rule, setting: Setting) -> list[str]:
    rows = []
    for row in (row for row in results.rows if row.setting == setting):
        native, pool, decode = results.native(row), row.pool, row.decode
        slots = ", ".join(f"{name} {n}" for name, n in pool.slots.items()) if pool else ""
        resident = pool.resident_pairs if pool else None
        pairs = row.store.experts if row.store else None
        moved = row.bytes_moved
        native_moved = native.bytes_moved if native else None
        is_native = row.plan.signal == NATIVE
        rows.append(
            (
                results.label(row.plan),
                slots or markdown.ABSENT,
                markdown.mib(pool and pool.device_bytes, 2),
                markdown.ABSENT if resident is None or pairs is None else f"{resident}/{pairs}",
                markdown.number(decode and decode.hit_rate, "{:.3f}"),
                markdown.number(decode and decode.degraded_fraction, "{:.3f}"),
                markdown.number(decode and decode.skipped_fraction, "{:.3f}"),
                markdown.number(decode and decode.exits_per_token, "{:.2f}"),
                markdown.mib(moved, 3),
                markdown.number(
                    moved / native_moved if moved is not None and native_moved else None, "×{:.2f}"
                ),
                markdown.interval(decode and decode.tokens_per_second, "{:.1f}"),
                "1" if is_native else _speed(row, native),
                markdown.number(
                    bound_tokens_per_second(row, rule.device_gb_s, rule.pcie_gb_s), "{:.0f}"
                ),
            )
        )
    head = (
        "plan",
        "slots",
        "pool MiB",
        "resident pairs",
        "hit rate",
        "degraded fraction",
        "skipped fraction",
        "exits a token",
        "MiB moved a token",
        "of native",
        "tokens/s measured",
        "against native",
        "bound tokens/s (model)",
    )
    return markdown.table(head, rows)


def _speed(row: Row, native: Row | None) -> str:
    relation = compare_speed(row, native) if native else None
    if relation is None or native is None or not row.decode or not native.decode:
        return markdown.ABSENT
    own, rival = row.decode.tokens_per_second, native.decode.tokens_per_second
    if own is None or rival is None or rival.value <= 0:
        return markdown.ABSENT
    return "equal" if relation == "equal" else f"×{own.value / rival.value:.2f}"
