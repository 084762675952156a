"""README's findings: every figure in them is a record's, printed as the documents print it."""

import re
from pathlib import Path

import pytest

from hobbit_jax.record import Native, Uniform
from hobbit_jax.report import answers, paired
from hobbit_jax.report.document import read_studies
from hobbit_jax.report.sweep import trial
from hobbit_jax.report.table import figure
from hobbit_jax.report.verdict import Outcome, Rule, verdicts
from hobbit_jax.sweep.texts import MIXED_TEXT

TASKS = ("task_arithmetic", "task_functions")
REPOSITORY = Path(__file__).resolve().parent.parent
# Digits that measure nothing: names, and what the reference model and the machine are.
NAMES = (
    r"Q\d_K(?:_M)?|IQ\d_\w+|docs/\S+|Qwen2\.5-Coder-1\.5B-Instruct|WikiText-2|GSM8K|2 bits|"
    r"14 million parameters|4 layers of 16 experts, 2 a token|2 CPU cores"
)


@pytest.fixture(scope="module")
def studies():
    return read_studies(REPOSITORY / "docs")


def of_the_sweep(studies):
    sweep = studies.sweep
    rule = Rule.of(sweep.study.rule)
    outcomes = [verdict.outcome for verdict in verdicts(sweep, rule)]
    q3, q2 = answers.uniform_quants(sweep, rule)
    budgets = (
        f"pools of {', '.join(q3.budgets.split(', ')[:-1])} and {q3.budgets.split(', ')[-1]} MiB"
    )

    def moved(quant):
        *most, last = quant.over_native(sweep, "bytes_moved_per_token").split(", ")
        return f"moves {', '.join(most)} and {last}"

    judged = answers.mixes(verdicts(sweep, rule))
    better = {s.name: s.against_draws["below"] for s in answers.scores(sweep, judged)}
    (by_weight,) = (s for s in answers.scores(sweep, judged) if better[s.name])
    assert by_weight.name == "router_weight" and not by_weight.against_line["below"]
    of_all = by_weight.against_draws
    uniform = [r for r in sweep.records if isinstance(trial(r).plan, Uniform)]
    native = next(r for r in sweep.records if trial(r).plan == Native())
    (problems,) = {native.metrics[f"{task}_problems"] for task in TASKS}
    losses = [paired.task_loss(r, native, task) for r in uniform for task in TASKS]
    most = max(losses, key=lambda loss: loss.high)
    open_ones = [v for v in verdicts(sweep, rule) if v.outcome == Outcome.OPEN]
    unheld = [
        [c.name for c in v.best.clauses if c.mark not in ("holds", "skipped")] for v in open_ones
    ]
    by_chance = [v for v, names in zip(open_ones, unheld, strict=True) if names == ["score"]]
    assert {trial(v.best.record).plan.mode for v in by_chance} == {"fetch_low"}
    return [
        f"Against {len(sweep.control_seeds)} random draws",
        f"in {of_all['below']} of {of_all.total()} choices of share and format",
        f"Q3_K costs a KL of {figure(q3.kl, '.4f')}",
        f"{moved(q3)} of native's bytes with {budgets}",
        f"Q2_K costs {q2.kl.value:.4f} and {moved(q2)}",
        f"Of {problems} problems of each of two synthetic tasks they lose at most "
        f"{figure(most, '.3f')}",
        f"In {len(by_chance)} of the open ones the best mix",
        f"Of {len(outcomes)} cases, each a pool with a low format, {outcomes.count(Outcome.OPEN)} "
        f"are open and {outcomes.count(Outcome.NO)} is not worth it",
        f"limit of {rule.kl_limit:g}",
    ]


def asked(record):
    return record.asked.plan, record.asked.inputs.calibration_text


def of_encoders(studies):
    plans = answers.encoders(studies.mixed)["Q2_K"]
    kl = {p.encoder: f"{p.kl.value:.4f}" for p in plans}
    solved = {p.encoder: f"{p.task('arithmetic').value:.2f}" for p in plans}
    records = studies.found.of("frontier")
    native, on_both = (
        f"{next(r for r in records if asked(r) == wanted).metrics['task_arithmetic']:.2f}"
        for wanted in ((Native(), ""), (Uniform("Q2_K", "gptq"), MIXED_TEXT))
    )
    return [
        f"GPTQ has a KL of {kl['gptq']}",
        f"ggml's encoder has {kl['ggml']}",
        f"The file solves {native} of the arithmetic problems as it is, {solved['gptq']} with this "
        f"GPTQ's Q2_K and {solved['ggml']} with ggml's; with GPTQ calibrated on code and problems "
        f"it solves {on_both}",
    ]


def of_real_weights(studies):
    def of(format, encoder):
        for frontier in studies.real:
            named = {(p.formats[0], p.encoder): p for p in frontier.uniform}
            yield frontier, named[format, encoder]

    def listed(figures):
        *most, last = figures
        return f"{', '.join(most)} and {last}"

    kl = {
        name: listed([f"{plan.kl.value:.3f}" for _, plan in of(*name)])
        for name in (("Q3_K", "ggml"), ("Q2_K", "ggml"))
    }
    ratios = [figure(frontier.over_ggml(plan), ".2f") for frontier, plan in of("Q2_K", "gptq")]
    task = "task_humaneval"
    scored = studies.real[0].scored
    plans = Native(), Uniform("Q2_K", "gptq"), Uniform("Q2_K", "ggml")
    native, gptq, ggml = (scored[plan] for plan in plans)
    scores = [figure(record.interval(task), ".2f") for record in (native, gptq, ggml)]
    loss = figure(paired.task_loss(gptq, native, task), ".2f")
    split = paired.mcnemar(gptq, ggml, task)
    return [
        f"Of HumanEval's {native.metrics[f'{task}_problems']} problems the file solves {scores[0]} "
        f"as published, and {scores[1]} with GPTQ's Q2_K, which is {loss} less in pairs",
        f"With ggml's Q2_K it solves {scores[2]}",
        f"{split[0]} are solved with GPTQ's alone and {split[1]} with ggml's alone "
        f"(McNemar's exact p {split[2]:.2g})",
        f"a KL of {kl['Q3_K', 'ggml']} on source code, WikiText-2 and GSM8K at Q3_K",
        f"of {kl['Q2_K', 'ggml']} at Q2_K",
        f"GPTQ's Q2_K has {listed(ratios)} times the KL of",
    ]


def of_misses(studies):
    cell = next(c for c in studies.misses.cells if (c.budget_mib, c.link) == (2.0, 4))
    plans = studies.misses.plans
    costs = {plan: [f"{cell.cost(r).value:.2f}" for r in cell.ways(plan)] for plan in plans}
    native, q3, q2 = (costs[plan] for plan in sorted(costs, key=lambda p: -float(costs[p][0])))
    best = cell.mixes[0]
    assert trial(best.record).plan.mode == "hobbit_host"
    below = studies.misses.count("below")
    return [
        "pool of 2 MiB",
        f"cost {native[-1]} MiB when they are fetched and {native[0]} when they are computed",
        f"computed Q3_K costs {q3[0]} and Q2_K {q2[0]}",
        f"cost {best.cost.value:.2f} at a KL of {best.record.metrics['kl_mean_nats']:.4f}",
        f"equal cost for {below} of {len(studies.misses.cells)} pairs of pool and link",
    ]


def of_the_planner(studies):
    (reports,) = (r for r in studies.found.of("planner") if r.subject == "planner reports")
    m = reports.metrics
    later = [row for row in reports.samples["rows"] if row["group"] == "found since"]
    return [
        f"is {100 * m['summary_median_error']:.0f} % over {m['summary_reports']} public reports",
        f"{100 * m['median_errors_found since']:.0f} % over the {len(later)} that",
    ]


CLAIMS = (of_the_sweep, of_encoders, of_real_weights, of_misses, of_the_planner)


@pytest.mark.parametrize("claims", CLAIMS)
def test_a_finding_is_what_its_records_say(studies, claims):
    text = findings()
    for claim in claims(studies):
        assert claim in text, f"{claim!r} is what the records say"


def test_no_figure_of_the_findings_is_without_a_record(studies):
    text = findings()
    for claims in CLAIMS:
        for claim in claims(studies):
            text = text.replace(claim, "")
    text = re.sub(NAMES, "", text)
    assert re.findall(r"[^.]*\d[^.]*\.", text) == []


def findings() -> str:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.split("## The answer so far")[1].split("![")[0]
    return re.sub(r"\s+", " ", section)
