"""The text of the decision document: the answer first, then what it rests on.

Owns what the document says and in which order: answer, rule, evidence, what is absent, what
the numbers cannot show, how to repeat them. Called by `writer.py`. A value that was not
measured is printed as "–" and never filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hobbit_jax.report import figures, markdown
from hobbit_jax.report.comparisons import (
    bound_tokens_per_second,
    compare_speed,
    control_gap,
    line_gap,
)
from hobbit_jax.report.frontier_results import FrontierResults
from hobbit_jax.report.peers import PeerRow, render_peers
from hobbit_jax.report.plans import Plans, render_plans
from hobbit_jax.report.results import NATIVE, RANDOM, Plan, Results, Row, Setting
from hobbit_jax.report.signals import render_compounding, render_signals
from hobbit_jax.report.threats import threats
from hobbit_jax.report.verdict import Outcome, Rule, Verdict


@dataclass(frozen=True)
class Studies:
    """What stands beside the sweep.

    Attributes:
        frontier: quality against all bytes, by signal.
        compounding: quality after an intermediate quant.
        peers: comparisons with other programs.
        plans: the planner's predictions for cards.
    """

    frontier: FrontierResults | None = None
    compounding: FrontierResults | None = None
    peers: Sequence[PeerRow] = ()
    plans: Plans | None = None


def render(
    results: Results,
    rule: Rule,
    answers: Sequence[Verdict],
    drawn: Iterable[str] = figures.NAMES,
    studies: Studies = Studies(),
) -> str:
    """The document as Markdown; `drawn` names the figures that exist."""
    drawn = set(drawn)
    sections = [
        [f"# {markdown.one_line(results.title)}"],
        _answer(results, answers),
        _rule(results, rule, answers),
        _quality(results, drawn),
        _signals(results, studies, drawn),
        [*_cost(results, rule, drawn), *_peers(studies.peers)],
        _gaps(results),
        ["## 7. Threats to validity", "", *(f"- {text}" for text in threats(results, rule))],
        *([render_plans(studies.plans)] if studies.plans else []),
        _reproduce(results),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _answer(results: Results, answers: Sequence[Verdict]) -> list[str]:
    absent = len(results.failed) + len(results.missing) + len(results.unreadable)
    lines = ["## 1. Question and answer", "", f"> {markdown.one_line(results.question)}", ""]
    if not answers:
        lines.append("**No answer.** No cell with a mixed plan has a usable row.")
    else:
        counts = [(o, sum(a.best.outcome is o for a in answers)) for o in Outcome]
        summary = "; ".join(f"{outcome.value}: {n}" for outcome, n in counts if n)
        best = next(o for o, n in counts if n)
        verdict = {
            Outcome.WORTH_IT: "**Yes, in some cases.**",
            Outcome.SMALLER_EXPERTS: "**Not by a signal.**",
            Outcome.NOT_NEEDED: "**No.**",
            Outcome.OPEN: "**Open.**",
            Outcome.NO: "**No.**",
        }[best]
        if counts[0][1] == len(answers):
            verdict = "**Yes.**"
        lines += [
            f"{verdict} One verdict for each pool budget and low format, by the rule in section "
            f"2. Of {len(answers)}: {summary}.",
            "",
            *markdown.table(
                (
                    "budget",
                    "low format",
                    "verdict",
                    "best candidate",
                    "what decided",
                    "against the uniform line (section 4)",
                    "uniform quants within the same limits",
                ),
                (_answer_line(results, answer) for answer in answers),
            ),
            "",
            "The last column names the uniform quants that keep the limits of KL, tasks and "
            "bytes moved too. They need no plan and no second format; a mixed plan has to be "
            "worth that difference.",
        ]
        if not any(judgement.row.on_gpu for a in answers for judgement in a.judgements):
            lines += [
                "",
                "Decode speed has no part in these verdicts: no candidate was timed on a GPU.",
            ]
    if absent:
        lines += [
            "",
            f"{absent} of {results.n_cells} cells have no usable row (section 6). The answer "
            "rests on the others.",
        ]
    return lines


def _answer_line(results: Results, answer: Verdict) -> tuple[str, ...]:
    best, plan = answer.best, answer.best.row.plan
    not_needed = best.outcome is Outcome.NOT_NEEDED
    return (
        results.setting_label(answer.setting),
        answer.low_format,
        best.outcome.value,
        markdown.ABSENT if not_needed else results.label(plan),
        "; ".join(condition.text for condition in best.decisive),
        markdown.ABSENT if not_needed else line_gap(plan, results).relation,
        ", ".join(results.label(plan) for plan in answer.simpler) or "none",
    )


def _rule(results: Results, rule: Rule, answers: Sequence[Verdict]) -> list[str]:
    candidates = [judgement for answer in answers for judgement in answer.judgements]
    lines = [
        "## 2. The rule, as the config states it",
        "",
        "A mixed plan is worth it at a pool budget if every clause holds:",
        "",
        f"- KL: the upper end of the mean KL to native is at most {rule.kl_limit:g} nats a token.",
        f"- tasks: no task score falls by more than {rule.task_loss_limit:g} against native.",
        "- bytes moved: a decoded token moves at most "
        f"{rule.bytes_moved_ratio_needed:g} × the bytes that native moves at the same budget. "
        "Where native moves none, mixing is not needed.",
        "- rivals: no plan of one precision needs as few host bytes or fewer, moves as few bytes "
        "or fewer, and has a KL that is not worse (intervals).",
        "- signal: its KL is below that of random choice at the same share (intervals apart). "
        "Where only this clause fails, the smaller experts pay and the signal does not.",
        f"- speed: on a GPU, decode is at least {rule.speedup_needed:g} × native's. On a CPU "
        "speed is not part of the rule: a fetch there is a copy within the same memory, so it "
        "does not cost what a transfer over PCIe costs.",
        "",
        "A clause that the rows cannot settle is open, and then the verdict is open too. The "
        "best candidate is the one with the best outcome, then the fewest failed clauses, then "
        "the fewest bytes moved.",
    ]
    if candidates:
        names = [condition.name for condition in candidates[0].conditions]
        lines += [
            "",
            "Every candidate:",
            "",
            *markdown.table(
                ("budget", "plan", *names, "outcome"),
                (
                    (
                        results.setting_label(judgement.row.setting),
                        results.label(judgement.row.plan),
                        *(condition.mark for condition in judgement.conditions),
                        judgement.outcome.value,
                    )
                    for judgement in candidates
                ),
            ),
        ]
    return lines


def _quality(results: Results, drawn: set[str]) -> list[str]:
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


def _signals(results: Results, studies: Studies, drawn: set[str]) -> list[str]:
    lines = ["## 4. Which signal", ""]
    if studies.frontier:
        lines += [*render_signals(studies.frontier, drawn), "", "### In the sweep of the cache", ""]
    lines += _signals_of_sweep(results)
    if studies.compounding:
        lines += ["", "### Compounding error", "", *render_compounding(studies.compounding)]
    return lines


def render_studies(title: str, question: str, command: str, sections: Sequence[Sequence[str]]):
    """A document of studies of quality alone."""
    head = [f"# {markdown.one_line(title)}", "", f"> {markdown.one_line(question)}"]
    end = ["## Reproduce", "", "```sh", markdown.one_line(command), "```"]
    return "\n\n".join("\n".join(section) for section in (head, *sections, end)) + "\n"


def _signals_of_sweep(results: Results) -> list[str]:
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


def _cost(results: Results, rule: Rule, drawn: set[str]) -> list[str]:
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


def _peers(peers: Sequence[PeerRow]) -> list[str]:
    lines = render_peers(peers)
    return ["", "### Peers", "", *lines] if lines else []


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


def _gaps(results: Results) -> list[str]:
    lines = ["## 6. Failed, missing and unreadable cells", ""]
    groups = (
        ("failed", results.failed),
        ("missing", results.missing),
        ("unreadable", results.unreadable),
    )
    rows = [(cell.cell, kind, cell.reason) for kind, cells in groups for cell in cells]
    if rows:
        lines += markdown.table(("cell", "state", "reason"), rows)
    else:
        lines.append(f"None: all {results.n_cells} cells have a row.")
    if results.unexpected:
        names = ", ".join(f"`{markdown.one_line(cell)}`" for cell in results.unexpected)
        lines += [
            "",
            f"Rows that are no part of this sweep, left out everywhere: {names}.",
        ]
    return lines


_FULL_SIZE = (
    "The same question of models of full size, which have not been here; they want a GPU:",
    "",
    "```sh",
    "python scripts/sweep.py --config configs/reference.py:qwen3-30b-a3b \\",
    "    --config.model=Qwen3-30B-A3B-Q4_K_M.gguf --workdir out/qwen3",
    "python scripts/sweep.py --config configs/reference.py:mixtral-8x7b \\",
    "    --config.model=Mixtral-8x7B-Instruct-Q4_K_M.gguf --workdir out/mixtral",
    "```",
    "",
    "Their cost is reckoned and not measured: 100 cells each; two low tiers of Qwen3's experts, a "
    "quarter of an hour on 2 CPU cores; up to 3 million tokens decoded for gsm8k and humaneval.",
)


def _reproduce(results: Results) -> list[str]:
    facts: dict[str, set[str]] = {}
    for row in results.rows:
        found = row.provenance
        values = {
            "git revision": found.get("git_revision"),
            "model sha256": found.get("model_sha256"),
            "text sha256": found.get("text_sha256"),
            "device": found.get("device"),
            **{f"tier {k} sha256": v for k, v in (found.get("tier_sha256") or {}).items()},
            **{f"version of {k}": v for k, v in (found.get("versions") or {}).items()},
        }
        for name, value in values.items():
            facts.setdefault(name, set()).add(
                markdown.ABSENT if value is None else markdown.one_line(str(value))
            )
    seconds = [row.provenance.get("seconds") for row in results.rows]
    known = [s for s in seconds if isinstance(s, int | float)]
    lines = ["## 8. Reproduce", "", "```sh", markdown.one_line(results.command), "```", ""]
    lines += [*_FULL_SIZE, ""]
    lines += markdown.table(
        ("what", "value"),
        [(name, ", ".join(sorted(values))) for name, values in facts.items()],
    )
    lines += [
        "",
        f"{len(known)} of {len(results.rows)} rows say how long they took: "
        f"{sum(known):.0f} seconds together.",
        "",
        "The resolved config:",
        "",
        "```json",
        json.dumps(results.config, indent=1, sort_keys=True),
        "```",
    ]
    return lines
