"""The answer of the decision document, and the rule that it was given by.

Owns sections 1 and 2: a verdict for each budget and format, then the rule's clauses with how every
candidate fares in each. Who is judged how is `verdict.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from hobbit_jax import markdown
from hobbit_jax.report.comparisons import line_gap
from hobbit_jax.report.results import Results
from hobbit_jax.report.verdict import Outcome, Rule, Verdict


def render_answer(results: Results, answers: Sequence[Verdict]) -> list[str]:
    """Lines of section 1: a verdict a budget and format."""
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


def render_rule(results: Results, rule: Rule, answers: Sequence[Verdict]) -> list[str]:
    """Lines of section 2: every clause, and how every candidate fares."""
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
