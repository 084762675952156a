"""The answers of the first page: one to each question, with evidence and confidence.

Owns how verdicts become words. The headline follows what was found in most cases, not the best
cell; whatever is open is called open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hobbit_jax.record import Benchmark, MissModeTrial, Record, Records, Uniform
from hobbit_jax.report.frontier import Frontier
from hobbit_jax.report.sweep import Sweep, is_control, low_format, on_gpu, trial
from hobbit_jax.report.sweep_tables import scores_below_control
from hobbit_jax.report.table import interval, listed, ratio
from hobbit_jax.report.verdict import Judgement, Outcome, Rule, Verdict, limits

SMALL_MODEL_BYTES = 2**30
FEW_DRAWS = 20
_TASK_NAMES = ("task_gsm8k", "task_humaneval")


@dataclass(frozen=True)
class Answer:
    """A question of the first page."""

    question: str
    answer: str
    evidence: str
    confidence: str
    changes: str


@dataclass(frozen=True)
class UniformQuant:
    """A uniform quant over all budgets. `status` is "yes", "no" or "open"."""

    format: str
    status: str
    why: str
    records: tuple[Record, ...]

    @property
    def kl(self) -> float:
        """Mean KL, nats a token."""
        return float(self.records[0].metrics.get("kl_mean_nats") or 0)


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
    return sorted(found, key=lambda quant: quant.kl)


def recommended(quants: Sequence[UniformQuant]) -> UniformQuant | None:
    """The nearest to native of those that keep the limits, else of those that are open."""
    for status in ("yes", "open"):
        found = [quant for quant in quants if quant.status == status]
        if found:
            return found[0]
    return None


def headline(sweep: Sweep, quants: Sequence[UniformQuant], verdicts: Sequence[Verdict]) -> str:
    """The finding in two sentences, then how far it can be trusted."""
    quant = recommended(quants)
    if quant is None:
        first = "Keep native experts: no uniform quant keeps the limits."
        if not quants:
            first = "Open: no uniform quant was measured."
    elif quant.status == "yes":
        first = f"Use a uniform {quant.format} quant."
    else:
        first = f"Lean to a uniform {quant.format} quant; that is not settled."
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
    sizes = {r.metrics.get("native_bytes") for r in sweep.records} - {None}
    if sizes and max(size or 0 for size in sizes) < SMALL_MODEL_BYTES:
        mib = max(size or 0 for size in sizes) / 2**20
        parts.append(f"the model's experts take {mib:.2f} MiB, so larger models may differ")
    if not sweep.is_finished:
        absent = len(sweep.missing) + len(sweep.unreadable)
        parts.append(f"{absent} of {len(sweep.study.trials)} records are absent")
    return f"Confidence is low beyond this model: {'; '.join(parts)}." if parts else ""


def answers(
    sweep: Sweep, rule: Rule, verdicts: Sequence[Verdict], frontier: Frontier | None, found: Records
) -> list[Answer]:
    """The separate answers to separate questions."""
    parts = [
        _smaller(sweep, rule),
        _mixed(sweep, verdicts),
        _score(sweep, verdicts),
        _on_a_miss(sweep, verdicts, found),
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
    kl = quant.records[0].interval("kl_mean_nats")
    moved, residents = [], []
    for record in quant.records:
        native = sweep.native(record)
        for name, values in (("bytes_moved_per_token", moved), ("resident_experts", residents)):
            own = record.metrics.get(name)
            base = native.metrics.get(name) if native else None
            values.append(ratio(own / base) if own is not None and base else "–")
    budgets = ", ".join(f"{trial(r).budget_mib:g}" for r in quant.records)
    return (
        f"{quant.format}: KL {interval(kl, '.4f')}; at {budgets} MiB moves {', '.join(moved)} of "
        f"native's bytes and holds {', '.join(residents)} as many experts"
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


def _mixed(sweep: Sweep, verdicts: Sequence[Verdict]) -> Answer:
    judged = [j for v in verdicts for j in v.judgements if not _by_miss(j.record)]
    counts = [(o.value, sum(v.outcome is o for v in verdicts)) for o in Outcome]
    answer = ", ".join(f"{name} in {n} of {len(verdicts)}" for name, n in counts if n)
    return Answer(
        "Mix precisions by an importance score?",
        answer or "open: no mix was measured",
        f"Against the uniform quants at the bytes that it moves: {_by_format(judged)}",
        "medium for this model and text; the best candidate was chosen on the text that judges it",
        "a mix whose KL is below the uniform line on a text that chose nothing",
    )


def _by_miss(record: Record) -> bool:
    return isinstance(trial(record).plan, MissModeTrial)


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


def _score(sweep: Sweep, verdicts: Sequence[Verdict]) -> Answer:
    relations = scores_below_control(sweep)
    judged = [j for v in verdicts for j in v.judgements if not _by_miss(j.record)]
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
    return Answer(
        "By which importance score?",
        answer if relations else "open: no score was measured",
        f"Below every random draw: {', '.join(counts['below'])}. Above every one: "
        f"{', '.join(counts['above'])}. Below the uniform line: {', '.join(counts['line'])}",
        f"low: a static score describes the text that it was measured on{few}",
        "scores measured on the text that is served; more draws",
    )


def _on_a_miss(sweep: Sweep, verdicts: Sequence[Verdict], found: Records) -> Answer | None:
    judged = [j for v in verdicts for j in v.judgements if _by_miss(j.record)]
    small = _small_low_bank(found)
    if not judged and not small:
        return None
    worth = [sweep.label(j.record) for j in judged if j.outcome is Outcome.WORTH_IT]
    unsettled = [
        f"{sweep.label(j.record)} at {sweep.at(j.record)}"
        for j in judged
        if j.outcome is Outcome.OPEN
    ]
    answer = listed(worth, f"open for {listed(unsettled)}" if unsettled else "not in this sweep")
    evidence = f"Of {len(judged)} miss modes: {_by_format(judged)}" if judged else ""
    if small:
        evidence += f". HOBBIT with a small low bank saves bytes (another study): {small}"
    windows = {len(j.record.samples["kl_nats_W"]) for j in judged}
    return Answer(
        "Demote an expert only when it is missing?",
        answer,
        evidence,
        f"low: {', '.join(map(str, sorted(windows))) or 'few'} windows of text, not timed on a GPU",
        "the same at a small low bank, timed, on as many windows as the uniform quants",
    )


def _small_low_bank(found: Records) -> str:
    """HOBBIT's bytes at its best split of the pool over native's on the same tokens."""
    native: dict[float, float] = {}
    for record in found.of("decode"):
        setting, moved = _setting(record), record.metrics.get("bytes_moved_per_token")
        if setting.get("setting") == "native" and moved:
            native[float(setting["budget_mib"])] = float(moved)
    parts = []
    for budget, base in sorted(native.items()):
        best = [
            r
            for r in found.of("residency")
            if _setting(r).get("text") == "evaluation"
            and _setting(r).get("budget_mib") == budget
            and str(_setting(r).get("setting")) == "hobbit, adaptive"
        ]
        for record in best:
            m = record.metrics
            moved, kl = m.get("bytes_moved_per_token"), m.get("kl_mean_nats")
            parts.append(f"{ratio((moved or 0) / base)} at {budget:g} MiB, KL {kl:.4f}")
    return ", ".join(parts)


def _setting(record: Record) -> dict:
    return dict(record.asked.setting) if isinstance(record.asked, Benchmark) else {}


def asked_items(sweep: Sweep, found: Records) -> list[tuple[str, str]]:
    """The four items that were asked for, each with what is done and what is not."""
    scored = {name for r in sweep.records for name in r.metrics if name in _TASK_NAMES}
    missing = [name.removeprefix("task_") for name in _TASK_NAMES if name not in scored]
    gpu = [r.device for r in sweep.records if on_gpu(r)]
    devices = sorted({r.device or "an unnamed device" for r in sweep.records})
    tasks = f"**not done:** {listed(missing)}" if missing else "GSM8K and HumanEval are scored"
    speed = _emulated(found)
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
            "Residents and bytes are counted below. "
            + ("Speed is in the appendix." if gpu else f"**Not done:** speed on a GPU.{speed}"),
        ),
    ]


def _emulated(found: Records) -> str:
    speedups = [
        (name, float(speed))
        for record in found.of("decode")
        for name in ("fetch_low", "uniform low")
        if str(_setting(record).get("setting")).startswith(name)
        and (speed := record.metrics.get("speedup")) is not None
    ]
    parts = [
        f"{name} {min(own):.2f} to {max(own):.2f}×"
        for name in dict.fromkeys(name for name, _ in speedups)
        if (own := [speed for other, speed in speedups if other == name])
    ]
    if not parts:
        return ""
    return (
        f" On an emulated link whose copies take a fixed multiple of compute, with plainly encoded "
        f"copies: {_joined(parts)} of native; the ratio follows from that multiple."
    )


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)
