"""README's findings: every figure in them is a record's, printed as the documents print it."""

import re
from pathlib import Path

import pytest

from hobbit_jax.report import answers
from hobbit_jax.report.document import read_studies
from hobbit_jax.report.table import figure
from hobbit_jax.report.verdict import Outcome, Rule, verdicts

REPOSITORY = Path(__file__).resolve().parent.parent
# Digits that measure nothing: names, and what the reference model and the machine are.
NAMES = r"Q\d_K(?:_M)?|IQ\d_\w+|docs/\S+|14 million parameters|2 CPU cores|4_K|2 and 3 bits"


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

    return [
        f"Q3_K costs a KL of {figure(q3.kl, '.4f')}",
        f"{moved(q3)} of native's bytes with {budgets}",
        f"Q2_K costs {q2.kl.value:.4f} and {moved(q2)}",
        f"worth it in {outcomes.count(Outcome.WORTH_IT)} of {len(outcomes)} cases",
        f"limit of {rule.kl_limit:g}",
    ]


def of_encoders(studies):
    kl = {p.encoder: f"{p.kl.value:.4f}" for p in answers.encoders(studies.mixed)["Q2_K"]}
    return [
        f"GPTQ with refinement has a KL of {kl['gptq']}",
        f"ggml's encoder has {kl['ggml']}",
        f"plain rounding has {kl['rtn']}",
    ]


def of_the_planner(studies):
    (reports,) = (r for r in studies.found.of("planner") if r.subject == "planner reports")
    m = reports.metrics
    return [
        f"median error is {100 * m['summary_median_error']:.0f} % over {m['summary_reports']} pub",
        f"{100 * m['median_errors_found since']:.0f} % over the",
    ]


@pytest.mark.parametrize("claims", [of_the_sweep, of_encoders, of_the_planner])
def test_a_finding_is_what_its_records_say(studies, claims):
    text = findings()
    for claim in claims(studies):
        assert claim in text, f"{claim!r} is what the records say"


def test_no_figure_of_the_findings_is_without_a_record(studies):
    text = findings()
    for claims in (of_the_sweep, of_encoders, of_the_planner):
        for claim in claims(studies):
            text = text.replace(claim, "")
    text = re.sub(NAMES, "", text)
    assert re.findall(r"[^.]*\d[^.]*\.", text) == []


def findings() -> str:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.split("## The answer so far")[1].split("\n## ")[0]
    return re.sub(r"\s+", " ", section)
