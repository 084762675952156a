"""The answers of the first page: one to each question, with evidence and confidence.

Owns how verdicts become words. The headline follows what was found in most cases, not the best
cell; whatever is open is called open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hobbit_jax.record import MissModeTrial, Record, Records, Uniform
from hobbit_jax.report.frontier import Frontier
from hobbit_jax.report.sweep import Sweep, at, is_control, low_format, on_gpu, trial
from hobbit_jax.report.sweep_tables import scores_below_control
from hobbit_jax.report.table import interval, listed, ratio
from hobbit_jax.report.verdict import Judgement, Outcome, Rule, Verdict, limits

SMALL_MODEL_BYTES = 2**30
FEW_DRAWS = 20
_TASK_NAMES = ("task_gsm8k", "task_humaneval")
_MOVED = "bytes_moved_per_token"


class Answer(NamedTuple):
    """A question of the first page."""

    question: str
    answer: str
    evidence: str
    confidence: str
    changes: str


class UniformQuant(NamedTuple):
    """A uniform quant over all budgets. `status` is "yes", "no" or "open"."""

    format: str
    status: str
    why: str
    records: tuple[Record, ...]


def uniform_quants(sweep: Sweep, rule: Rule) -> list[UniformQuant]:
    """The uniform quants, the nearest to native first."""
    groups: dict[str, list[Record]] = {}
    for record in sweep.records:
        if isinstance(trial(record).plan, Uniform):
            groups.setdefault(low_format(record) or "", []).append(record)
    found = []
    for name, records in groups.items():
        clauses = [c for r in records for c in limits(r, sweep.native(r), rule)]
        failed = [c.text for c in clauses if c.mark == "fails"]
        unsettled = [c.text for c in clauses if c.holds is None]
        if failed:
            status, why = "no", failed[0]
        elif not sweep.is_finished:
            status, why = "open", "the sweep is not finished"
        else:
            status, why = ("open", unsettled[0]) if unsettled else ("yes", "all limits are kept")
        found.append(UniformQuant(name, status, why, tuple(records)))
    return sorted(found, key=lambda quant: quant.records[0].metrics.get("kl_mean_nats") or 0)


def headline(sweep: Sweep, rule: Rule, verdicts: Sequence[Verdict]) -> str:
    """The finding in two sentences, then how far it can be trusted.

    Of uniform quants it names the nearest to native that keeps the limits, else the nearest that
    is open.
    """
    quants = uniform_quants(sweep, rule)
    yes, unsettled = ([q.format for q in quants if q.status == s] for s in ("yes", "open"))
    if yes:
        first = f"Use a uniform {yes[0]} quant."
    elif unsettled:
        first = f"Lean to a uniform {unsettled[0]} quant; that is not settled."
    elif quants:
        first = "Keep native experts: no uniform quant keeps the limits."
    else:
        first = "Open: no uniform quant was measured."
    return f"**{first} {_mixing(verdicts)}** {_trust(sweep)}"


def _mixing(verdicts: Sequence[Verdict]) -> str:
    total = len(verdicts)
    worth = sum(v.outcome is Outcome.WORTH_IT for v in verdicts)
    unsettled = sum(v.outcome is Outcome.OPEN for v in verdicts)
    if not total:
        return "Mixing precisions is open: no mix was measured."
    if worth == total:
        return f"Mix precisions: it is worth it in all {total} cases."
    if worth + unsettled == 0:
        return f"Do not mix precisions: it is worth it in none of {total} cases."
    text = f"Mixing precisions is worth it in {worth} of {total} cases"
    return f"{text} and open in {unsettled}." if unsettled else f"{text}."


def _trust(sweep: Sweep) -> str:
    parts = []
    if not any(map(on_gpu, sweep.records)):
        parts.append("no figure is from a GPU")
    native_bytes = max((r.metrics.get("native_bytes") or 0 for r in sweep.records), default=0)
    if 0 < native_bytes < SMALL_MODEL_BYTES:
        mib = native_bytes / 2**20
        parts.append(f"the model's experts take {mib:.2f} MiB, so larger models may differ")
    if not sweep.is_finished:
        parts.append(f"{sweep.n_absent} of {len(sweep.study.trials)} records are absent")
    return f"Confidence is low beyond this model: {'; '.join(parts)}." if parts else ""


def answers(
    sweep: Sweep, rule: Rule, verdicts: Sequence[Verdict], frontier: Frontier | None, found: Records
) -> list[Answer]:
    """The separate answers to separate questions."""
    judged = [j for v in verdicts for j in v.judgements]
    by_miss = [j for j in judged if isinstance(trial(j.record).plan, MissModeTrial)]
    mixes = [j for j in judged if j not in by_miss]
    parts = [
        _smaller(sweep, rule),
        _mixed(verdicts, mixes),
        _score(sweep, mixes),
        _on_a_miss(sweep, by_miss, found),
        _encoder(frontier, rule),
    ]
    return [part for part in parts if part]


def _smaller(sweep: Sweep, rule: Rule) -> Answer:
    quants = uniform_quants(sweep, rule)
    reasons: dict[tuple[str, str], list[str]] = {}
    for quant in quants:
        reasons.setdefault((quant.status, quant.why), []).append(quant.format)
    text = "; ".join(
        f"{listed(names)}: {status}, since {why}" for (status, why), names in reasons.items()
    )
    return Answer(
        "Store every expert in a smaller format?",
        text or "open: not measured",
        "; ".join(_costs(sweep, quant) for quant in quants),
        "medium for this model and text",
        "enough problems to settle the tasks; another encoder or text",
    )


def _costs(sweep: Sweep, quant: UniformQuant) -> str:
    moved, residents = (
        ", ".join(ratio(sweep.over_native(r, metric)) for r in quant.records)
        for metric in (_MOVED, "resident_experts")
    )
    budgets = ", ".join(f"{trial(r).budget_mib:g}" for r in quant.records)
    return (
        f"{quant.format}: KL {interval(quant.records[0].interval('kl_mean_nats'), '.4f')}; at "
        f"{budgets} MiB moves {moved} of native's bytes and holds {residents} as many experts"
    )


def _encoder(frontier: Frontier | None, rule: Rule) -> Answer | None:
    """Which encoders keep the limit of KL, by format; None without a study of them."""
    if frontier is None or not frontier.uniform:
        return None
    verdicts, evidence = [], []
    for name in sorted({p.formats[0] for p in frontier.uniform}):
        plans = [p for p in frontier.uniform if p.formats[0] == name]
        kept = [p.encoder for p in plans if p.kl.high <= rule.kl_limit]
        over = [p.encoder for p in plans if p.kl.high > rule.kl_limit]
        text = f"{name} keeps the limit of KL with {listed(kept, 'no encoder')}"
        verdicts.append(text + (f", not with {listed(over)}" if over else ""))
        figures = ", ".join(f"{p.encoder} {p.kl.value:.4f}" for p in plans)
        evidence.append(f"{name}: KL {figures}")
    return Answer(
        "Does the encoder decide?",
        "; ".join(verdicts),
        "; ".join(evidence),
        "medium for this model and text",
        "an encoder's statistics that do not fit the memory for a larger model",
    )


def _mixed(verdicts: Sequence[Verdict], judged: Sequence[Judgement]) -> Answer:
    counts = [(o.value, sum(v.outcome is o for v in verdicts)) for o in Outcome]
    answer = ", ".join(f"{name} in {n} of {len(verdicts)}" for name, n in counts if n)
    return Answer(
        "Mix precisions by an importance score?",
        answer or "open: no mix was measured",
        f"Against the uniform quants at the bytes that it moves: {_by_format(judged)}",
        "medium for this model and text; the best candidate was chosen on the text that judges it",
        "a mix whose KL is below the uniform line on a text that chose nothing",
    )


def _by_format(judged: Sequence[Judgement]) -> str:
    parts = []
    for name in sorted({low_format(j.record) or "" for j in judged}):
        gaps = [j.gap for j in judged if low_format(j.record) == name]
        known = [gap for gap in gaps if gap]
        below, above = sum(g.high < 0 for g in known), sum(g.low > 0 for g in known)
        parts.append(
            f"of {len(gaps)} mixes with {name}, {below} have less KL, {above} more, "
            f"{len(known) - below - above} cannot be told apart"
            + (f", {len(gaps) - len(known)} have no rival" if len(gaps) > len(known) else "")
        )
    return "; ".join(parts)


def _score(sweep: Sweep, judged: Sequence[Judgement]) -> Answer:
    relations = scores_below_control(sweep)
    counts: dict[str, list[str]] = {"below": [], "above": [], "line": []}
    winners = []
    for score, found in relations.items():
        own = [j for j in judged if getattr(trial(j.record).plan, "score", "") == score]
        better = sum(j.gap is not None and j.gap.high < 0 for j in own)
        for name in ("below", "above"):
            counts[name].append(f"{score} {found.count(name)} of {len(found)}")
        counts["line"].append(f"{score} {better} of {len(own)}")
        if 2 * found.count("below") > len(found) and better:
            winners.append(score)
    seeds = {trial(r).seed for r in sweep.records if is_control(r)}
    few = f", and {len(seeds)} random draws are few" if len(seeds) < FEW_DRAWS else ""
    answer = "none of them pays"
    if winners:
        answer = f"{listed(winners)}, if any: better than random mostly, than uniform at times"
    below, above, line = (", ".join(parts) for parts in counts.values())
    return Answer(
        "By which importance score?",
        answer if relations else "open: no score was measured",
        f"Below every random draw: {below}. Above every one: {above}. Below the uniform line: "
        f"{line}",
        f"low: a static score describes the text that it was measured on{few}",
        "scores measured on the text that is served; more draws",
    )


def _on_a_miss(sweep: Sweep, judged: Sequence[Judgement], found: Records) -> Answer | None:
    small = _small_low_bank(found)
    if not judged and not small:
        return None
    worth = [sweep.label(j.record) for j in judged if j.outcome is Outcome.WORTH_IT]
    unsettled = [
        f"{sweep.label(j.record)} at {at(j.record)}" for j in judged if j.outcome is Outcome.OPEN
    ]
    evidence = f"Of {len(judged)} miss modes: {_by_format(judged)}" if judged else ""
    if small:
        evidence += f". HOBBIT with a small low bank saves bytes (another study): {small}"
    windows = sorted({len(j.record.samples["kl_nats_W"]) for j in judged})
    return Answer(
        "Demote an expert only when it is missing?",
        listed(worth, f"open for {listed(unsettled)}" if unsettled else "not in this sweep"),
        evidence,
        f"low: {', '.join(map(str, windows)) or 'few'} windows of text, not timed on a GPU",
        "the same at a small low bank, timed, on as many windows as the uniform quants",
    )


def _small_low_bank(found: Records) -> str:
    """HOBBIT's bytes at its best split of the pool over native's on the same tokens."""
    native = {
        float(r.setting["budget_mib"]): r.metrics[_MOVED]
        for r in found.of("decode")
        if r.setting.get("setting") == "native" and r.metrics.get(_MOVED)
    }
    wanted = {"text": "evaluation", "setting": "hobbit, adaptive"}
    return ", ".join(
        f"{ratio((r.metrics.get(_MOVED) or 0) / (base or 1))} at {budget:g} MiB, KL "
        f"{r.metrics.get('kl_mean_nats'):.4f}"
        for budget, base in sorted(native.items())
        for r in found.of("residency")
        if {**wanted, "budget_mib": budget}.items() <= r.setting.items()
    )


def asked_items(sweep: Sweep, found: Records) -> list[tuple[str, str]]:
    """The four items that were asked for, each with what is done and what is not."""
    scored = {name for r in sweep.records for name in r.metrics if name in _TASK_NAMES}
    missing = [name.removeprefix("task_") for name in _TASK_NAMES if name not in scored]
    gpu = any(map(on_gpu, sweep.records))
    devices = sorted({r.device or "an unnamed device" for r in sweep.records})
    tasks = f"**not done:** {listed(missing)}" if missing else "GSM8K and HumanEval are scored"
    speed = "Speed is in the appendix."
    if not gpu:
        speed = f"**Not done:** speed on a GPU.{_emulated(found)}"
    return [
        (
            "Quality of 2 and 3 bits on top of the model's own quant",
            f"KL, perplexity and miniature tasks are answered for {sweep.model}; {tasks}.",
        ),
        ("Which importance score", f"Answered for {sweep.model} on one text, see below."),
        (
            "A low-bit path on one backend",
            f"It runs on {listed(devices)}." + ("" if gpu else " **Not done:** a GPU."),
        ),
        (
            "Residents and decode speed against native SLRU",
            f"Residents and bytes are counted below. {speed}",
        ),
    ]


def _emulated(found: Records) -> str:
    speedups: dict[str, list[float]] = {}
    for record in found.of("decode"):
        speed = record.metrics.get("speedup")
        for name in ("fetch_low", "uniform low"):
            if str(record.setting.get("setting")).startswith(name) and speed is not None:
                speedups.setdefault(name, []).append(speed)
    if not speedups:
        return ""
    parts = [f"{name} {min(own):.2f} to {max(own):.2f}×" for name, own in speedups.items()]
    return (
        f" On an emulated link whose copies take a fixed multiple of compute, with plainly encoded "
        f"copies: {', '.join(parts)} of native; the ratio follows from that multiple."
    )
