"""The decision document: it obeys the rule, hides nothing, and depends on the records alone."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hobbit_jax.record import (
    CacheTrial,
    EvalSizes,
    Inputs,
    MissModeTrial,
    Mixed,
    Native,
    Record,
    Study,
    Uniform,
    read_records,
    read_study,
    write_record,
    write_study,
)
from hobbit_jax.report import paired, sweep_tables
from hobbit_jax.report.against import render as render_against
from hobbit_jax.report.answers import uniform_quants
from hobbit_jax.report.document import APPENDIX, DOCUMENT, LETTER, write_report
from hobbit_jax.report.export import export
from hobbit_jax.report.miss_tables import MissStudy, all_ways, cheapest, label
from hobbit_jax.report.sweep import RANDOM, Sweep, order, trial
from hobbit_jax.report.table import Column, table
from hobbit_jax.report.verdict import (
    PREFERENCE,
    Judgement,
    Outcome,
    Rule,
    control,
    verdicts,
)

MIB = 2**20
RULE = {
    "kl_limit": 0.05,
    "speedup_needed": 1.2,
    "bytes_moved_ratio_needed": 0.7,
    "task_loss_limit": 0.05,
    "card": "12 GB",
}
SIZES = EvalSizes(windows=24, context=8, calibration_windows=2)
NOISE_W = np.random.default_rng(0).gamma(2.0, 0.5, SIZES.windows)  # what windows have in common
NOISE_W /= NOISE_W.mean()
PROBLEMS = 2000
CPU = "cpu: Some Processor"
FREQUENCY = Mixed("frequency", 0.5, "Q2_K")


def record(
    plan, kl=0.0, moved=1.0, budget=2.0, *, lost=0.0, native_score=0.6, windows=SIZES.windows,
    seed=0, device=CPU, speed=50.0, demoted=None, model="", paired_tasks=True,
):  # fmt: skip
    """A record whose windows are `kl` times what all plans share, within 2 %."""
    own = np.random.default_rng(abs(hash((kl, moved))) % 2**32).uniform(0.98, 1.02, windows)
    kl_W = kl * NOISE_W[:windows] * own
    solved = np.arange(PROBLEMS) < round((native_score - lost) * PROBLEMS)
    score = float(solved.mean())
    if demoted is None:
        demoted = getattr(plan, "share", float(isinstance(plan, Uniform)))
    metrics = {
        "evaluation_tokens": 8 * windows, "perplexity": 30.0, "kl_mean_nats": float(kl_W.mean()),
        "kl_mean_nats_low": float(kl_W.mean()) * 0.9, "kl_mean_nats_high": float(kl_W.mean()) * 1.1,
        "task_sums": score, "task_sums_low": score - 0.02, "task_sums_high": score + 0.02,
        "task_sums_problems": PROBLEMS, "task_sums_correct": int(solved.sum()),
        "experts": 64, "native_bytes": 8 * MIB, "stored_bytes": 6 * MIB, "resident_experts": 19,
        "bytes_moved_per_token": moved * MIB, "demoted_share": demoted,
        "decode_tokens": 288, "decode_tokens_per_s": speed, "decode_tokens_per_s_low": speed - 1,
        "decode_tokens_per_s_high": speed + 1, "first_token_s": 0.125, "hit_rate": 0.5,
    }  # fmt: skip
    samples = {"kl_nats_W": kl_W.tolist(), "repeat_s": [2.0, 2.1]}
    if paired_tasks:
        samples["task_sums_solved"] = solved.tolist()
    if isinstance(plan, Native):
        samples["selections_LE"] = [
            [100 + 7 * e * (layer + 1) for e in range(16)] for layer in (0, 1)
        ]
    asked = CacheTrial(plan, budget, Inputs(model), SIZES, seed=seed)
    hashes = {"model": "m" * 64, "text": "x" * 64}
    return Record("s", asked, metrics, samples, {}, hashes, "abc", device, 1, 2, seconds=12.5)


def winning(budget=2.0, *, device=CPU, **mixed):
    """A sweep whose frequency plan meets every clause; `mixed` changes that plan."""

    def of(plan, kl, moved, **more):
        return record(plan, kl, moved, budget, device=device, **more)

    draws = [of(Mixed(RANDOM, 0.5, "Q2_K"), 0.02 + 0.001 * n, 0.5, seed=n) for n in range(3)]
    return [
        of(Native(), 0.0, 1.0),
        of(Uniform("Q3_K"), 0.02, 0.6),
        of(Uniform("Q2_K"), 0.04, 0.3),
        of(FREQUENCY, **{"kl": 0.01, "moved": 0.5, "speed": 70.0, **mixed}),
        *draws,
    ]  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    def make(records, *, more=(), rule=RULE, name="w", **study):
        folder = tmp_path / name
        names = tuple(dict.fromkeys([*(r.name for r in records), *more]))
        described = Study("s", "T", "Is it\nworth it?", "python x", {"a": 1}, rule, names)
        write_study(folder, replace(described, **study))
        for one in records:
            write_record(folder, one)
        return folder

    return make


def sweep_of(folder):
    return Sweep.of(read_study(folder, "s"), read_records(folder))


def outcome(folder):
    sweep = sweep_of(folder)
    (found,) = verdicts(sweep, Rule.of(sweep.study.rule))
    return found


def test_a_plan_that_meets_every_clause_is_worth_it(workdir):
    folder = workdir(winning())
    assert outcome(folder).outcome is Outcome.WORTH_IT
    text = write_report(folder).read_text()
    assert "Mix precisions: it is worth it in all 1 cases." in text
    assert "| 2 MiB | Q2_K | worth it | frequency 50 % Q2_K |" in text


GPU = "cuda: NVIDIA GeForce RTX 4070"


@pytest.mark.parametrize(
    ("change", "wanted", "says"),
    [
        ({"kl": 0.06}, Outcome.NO, "limit 0.05"),
        ({"kl": 0.0495}, Outcome.NO, "uniform line"),
        ({"lost": 0.2}, Outcome.NO, "sums loses 0.200"),
        ({"lost": 0.0525}, Outcome.OPEN, "sums loses 0.05"),
        ({"lost": 0.0475}, Outcome.OPEN, "sums loses 0.04"),
        ({"moved": 0.71}, Outcome.NO, "0.71×, needed 0.7× or less"),
        ({"kl": 0.0214, "moved": 0.5}, Outcome.AS_RANDOM, "KL less the mean of 3 random draws"),
        ({"moved": 0.1, "kl": 0.009}, Outcome.OPEN, "no uniform quant moves as many bytes"),
        (
            {"device": GPU, "speed": 55.0},
            Outcome.NO,
            "decodes 1.10 [1.06, 1.14]× as fast as native",
        ),
        ({"device": GPU, "speed": 59.0}, Outcome.OPEN, "decodes 1.18 [1.14, 1.22]× as fast"),
        ({"device": GPU, "speed": 61.0}, Outcome.WORTH_IT, ""),
    ],
)
def test_each_clause_decides(workdir, change, wanted, says):
    found = outcome(workdir(winning(**change)))
    assert found.outcome is wanted
    text = "; ".join(clause.name + " " + clause.text for clause in found.best.decisive)
    assert says in text


def test_bytes_moved_are_open_where_prompts_disagree(workdir):
    """0.65 of native's bytes on average, of which two of six prompts move more than 0.7."""
    native_R, own_R = np.ones(6), np.array([0.4, 0.5, 0.6, 0.6, 0.85, 0.95])

    def told(one):
        per_R = {Native(): native_R, FREQUENCY: own_R}.get(trial(one).plan, 0.5 * native_R) * MIB
        return replace(one, samples={**one.samples, "bytes_moved_per_token_R": per_R.tolist()})

    folder = workdir([told(one) for one in winning(moved=0.65)])
    found = outcome(folder)
    (clause,) = (c for c in found.best.clauses if c.name == "bytes moved")
    assert found.outcome is Outcome.OPEN and clause.mark == "open"
    low, high = map(float, re.search(r"0.65 \[(.+), (.+)\]×", clause.text).groups())
    # Native moves as much for each prompt, so the ratio's interval is that of a mean.
    wanted = stats.ttest_1samp(own_R, 0).confidence_interval()
    assert (low, high) == pytest.approx(wanted, abs=0.005)
    assert "have no interval" not in (write_report(folder).parent / APPENDIX).read_text()


def test_a_native_model_that_solves_nothing_leaves_the_answer_open(workdir):
    zeros = {"task_sums": 0.0, "task_sums_low": 0.0, "task_sums_correct": 0}
    samples = {"task_sums_solved": [False] * PROBLEMS}
    records = [
        replace(r, metrics={**r.metrics, **zeros}, samples={**r.samples, **samples})
        for r in winning()
    ]
    folder = workdir(records)
    assert outcome(folder).outcome is Outcome.OPEN
    assert "native solves no problem of sums" in write_report(folder).read_text()
    assert {q.status for q in uniform_quants(sweep_of(folder), Rule.of(RULE))} == {"open"}


def test_nothing_is_needed_where_native_moves_nothing(workdir):
    records = winning()
    records[0] = record(Native(), 0.0, 0.0)
    assert outcome(workdir(records)).outcome is Outcome.NOT_NEEDED


def test_an_unfinished_sweep_is_open_whatever_the_rest_says(workdir):
    for number, records in enumerate((winning(), winning(kl=0.06))):
        folder = workdir(records, more=["never-ran"], name=f"w{number}")
        assert outcome(folder).outcome is Outcome.OPEN
        text = write_report(folder).read_text()
        assert "open in 1" in text and "1 of 8 records are absent" in text
        assert "**Use" not in text and "**Keep" not in text
        assert "- never-ran is missing." in (folder / "appendix.md").read_text()


def test_a_failed_candidate_opens_its_own_format_alone(workdir):
    other = [replace(FREQUENCY, format="Q3_K"), Mixed(RANDOM, 0.5, "Q3_K")]
    broken = CacheTrial(replace(FREQUENCY, score="sensitivity"), 2.0, Inputs(), SIZES)
    failed = Record("s", broken, status="failed", error="ValueError: no\nroom | here")
    draws = [record(other[1], 0.03 + 0.001 * n, 0.62, seed=n) for n in range(3)]
    folder = workdir([*winning(), record(other[0], 0.012, 0.62), *draws, failed])
    sweep = sweep_of(folder)
    found = {v.low_format: v for v in verdicts(sweep, Rule.of(RULE))}
    assert found["Q2_K"].outcome is Outcome.OPEN and "sensitivity" in found["Q2_K"].why_open
    assert found["Q3_K"].outcome is Outcome.WORTH_IT
    write_report(folder)
    assert " failed: ValueError: no room | here\n" in (folder / "appendix.md").read_text()


def test_a_rule_changed_after_the_first_record_is_said_on_top(workdir):
    folder = workdir(winning(kl=0.015))
    assert "another rule" not in write_report(folder).read_text()
    study = read_study(folder, "s")
    write_study(folder, replace(study, rule={**RULE, "kl_limit": 0.001}))
    text = write_report(folder).read_text()
    assert "another rule than the study's first record: kl_limit was 0.05 and is 0.001" in text
    assert text.index("another rule") < text.index("**Keep native experts")
    # A description that was lost does not make a rule look old.
    (folder / "records" / "s.study.json").unlink()
    write_study(folder, study)
    assert (
        "rule that stood before the first record is not known" in write_report(folder).read_text()
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 0.06), st.floats(0.3, 1.0)), min_size=2, max_size=6))
def test_the_best_candidate_is_first_in_the_printed_order(plans):
    scores = [Mixed(f"score_{n}", 0.5, "Q2_K") for n in range(len(plans))]
    records = [*winning(), *(record(s, *p) for s, p in zip(scores, plans, strict=True))]
    study = Study("s", "T", "?", "c", {}, RULE, tuple(r.name for r in records), RULE)
    sweep = Sweep(study, tuple(records), (), (), ())
    (found,) = verdicts(sweep, Rule.of(RULE))
    outcomes = [list(Outcome).index(j.outcome) for j in found.judgements]
    assert found.best.outcome is list(Outcome)[min(outcomes)]
    for _, key in PREFERENCE:
        left = [j for j in found.judgements if j not in (found.best,)]
        smaller = [j for j in left if key(j) < key(found.best)]
        # Whoever is better in this must be worse in something that is compared before.
        before = [k for _, k in PREFERENCE[: [k for _, k in PREFERENCE].index(key)]]
        assert all(any(k(j) > k(found.best) for k in before) for j in smaller)


def test_the_random_control_is_no_candidate(workdir):
    sweep = sweep_of(workdir(winning()))
    (found,) = verdicts(sweep, Rule.of(RULE))
    assert [trial(j.record).plan for j in found.judgements] == [FREQUENCY]


def test_a_miss_mode_is_compared_on_the_windows_that_it_has(workdir):
    """Its few windows are harder for every plan; only within them is it below its control."""
    mode = MissModeTrial("fetch_low", 0.8, "Q2_K")
    records = [*winning(), record(mode, 0.012, 0.5, windows=4, demoted=0.5)]
    sweep = sweep_of(workdir(records))
    (own,) = [r for r in sweep.records if trial(r).plan == mode]
    judged = Judgement(own, sweep, Rule.of(RULE))
    # Control: half of the selections at random, which is the random plan itself.
    draws = [
        np.array(r.samples["kl_nats_W"])[:4]
        for r in records
        if trial(r).plan == Mixed(RANDOM, 0.5, "Q2_K")
    ]
    own_W = np.array(own.samples["kl_nats_W"])
    found, mean_W = control(own, sweep), np.mean(draws, axis=0)
    wanted = stats.ttest_1samp(own_W - mean_W, 0).confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx((wanted.low, wanted.high))
    kl_D = np.mean(draws, axis=1)
    standard_error = kl_D.std(ddof=1) * (1 + 1 / 3) ** 0.5
    assert found.p == pytest.approx(stats.t(2).cdf((own_W.mean() - kl_D.mean()) / standard_error))
    assert judged.gap.value == pytest.approx(own_W.mean() - _line(sweep, own, 4).mean())


def _line(sweep, own, windows):
    by_plan = {trial(r).plan: np.array(r.samples["kl_nats_W"]) for r in sweep.records}
    q3, q2 = by_plan[Uniform("Q3_K")], by_plan[Uniform("Q2_K")]
    return (q2 + (0.5 - 0.3) / (0.6 - 0.3) * (q3 - q2))[:windows]


@given(
    st.lists(st.floats(0, 100).map(lambda x: round(x, 3)), min_size=2, max_size=6, unique=True),
    st.floats(-10, 110),
    st.integers(0, 99),
)
def test_the_line_is_numpys_interpolation_in_each_window(places, x, seed):
    kl_PW = np.random.default_rng(seed).random((len(places), 3))
    found = paired.line_at(x, list(zip(places, kl_PW, strict=True)))
    order = np.argsort(places)
    if not min(places) <= x <= max(places):
        assert found is None
        return
    wanted = [np.interp(x, np.array(places)[order], kl_PW[order, w]) for w in range(3)]
    assert found == pytest.approx(wanted)


def test_pairs_tell_apart_what_intervals_do_not():
    rng = np.random.default_rng(3)
    shared_W = rng.gamma(2.0, 0.5, 48)
    left_W, right_W = (
        shared_W * (1 + shift + 0.01 * rng.standard_normal(48)) for shift in (0, 0.02)
    )
    found = paired.difference(left_W, right_W)
    assert found.high < 0
    assert paired.mean_interval(left_W).high > paired.mean_interval(right_W).low
    # Newcombe (1998), table II, method 10, example (a): 56/70 less 48/80.
    shares = {"a": (56, 70, 0.7, 0.877), "b": (48, 80, 0.49, 0.7)}
    counts = {}
    for name, (correct, problems, *_) in shares.items():
        ends = stats.binomtest(correct, problems).proportion_ci(method="wilson")
        metrics = {"task_x": correct / problems, "task_x_low": ends.low, "task_x_high": ends.high}
        counts[name] = Record("s", trial(record(Native())), metrics)
    loss = paired.task_loss(counts["b"], counts["a"], "task_x")
    assert (loss.value, loss.low, loss.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_the_title_names_the_model_and_measured_metrics_are_shown(workdir):
    records = [
        replace(r, asked=replace(r.asked, inputs=Inputs("out/Qwen3-30B.gguf"))) for r in winning()
    ]
    folder = workdir(records)
    text = write_report(folder).read_text()
    assert text.startswith("# Should Qwen3-30B store experts below native precision?")
    appendix = (folder / "appendix.md").read_text()
    assert "first token, s" in appendix and "0.125" in appendix
    assert "decode tokens/s" not in appendix  # measured on no GPU
    assert "**not done:** gsm8k and humaneval" in text


def test_a_metric_is_shown_by_one_column():
    rows = [Record("s", trial(record(Native())), {"joules_per_token": 1.25})]
    assert table([Column("J a token", "joules_per_token", ".1f")], rows).endswith("| 1.2 |")
    assert table([Column("J a token", "joules", ".1f")], rows) == "|  |\n|  |\n|  |"


EXPORTS = (("t.csv", pandas.read_csv), ("t.parquet", pandas.read_parquet))


def big():
    return [r for budget in (1.0, 2.0, 4.0) for r in winning(budget)]


def merge(records, pattern):
    """Puts files of one record together, as `cat` does."""
    paths = sorted(records.glob(pattern))
    (records / "s.jsonl").write_text("".join(path.read_text() for path in paths))
    for path in paths:
        path.unlink()


def test_the_same_records_give_the_same_bytes(workdir):
    first, second = workdir(big(), name="w"), workdir(big()[::-1], name="v/w")
    merge(second / "records", "mixed*.json")
    study = read_study(first, "s")
    write_study(second, study)
    write_report(first)
    found = [path for path in first.rglob("*.*") if "records" not in path.parts]
    names = [path.relative_to(first) for path in found]
    write_report(second)
    assert {str(name) for name in names} >= {DOCUMENT, APPENDIX, LETTER} and len(names) == 4
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert not list(first.rglob("*.partial"))


def test_the_kept_document_is_what_its_records_say(tmp_path, request):
    """docs/ after `scripts/report.py --workdir docs`; figures may differ between matplotlibs."""
    docs = request.config.rootpath / "docs"
    shutil.copytree(docs / "records", tmp_path / "docs" / "records")
    write_report(tmp_path / "docs")
    for name in (DOCUMENT, APPENDIX, LETTER):
        assert (tmp_path / "docs" / name).read_text() == (docs / name).read_text(), name


def test_a_study_under_way_is_readable_beside_torn_files(workdir):
    folder = workdir(winning(), more=["torn"])
    (folder / "records" / "torn.json").write_text('{"study": "s"')
    text = write_report(folder).read_text()
    assert (
        "1 of 8 records are absent" in text
        and "of 1 cases (a pool with a low format) 1 is open." in text
    )
    assert "- torn.json is unreadable: " in (folder / "appendix.md").read_text()
    # One that no trial of this study has is said, and decides nothing.
    (folder / "records" / "torn.json").rename(folder / "records" / "other.json")
    write_record(folder, record(Uniform("IQ4_XS"), 0.005, 0.8))
    names = tuple(r.name for r in read_records(folder).of("s"))
    write_study(folder, replace(read_study(folder, "s"), trials=names))
    assert "Mix precisions: it is worth it" in write_report(folder).read_text()
    assert "- other.json is unreadable: " in (folder / "appendix.md").read_text()


def failed_of(plan, budget=2.0):
    asked = CacheTrial(plan, budget, Inputs(), SIZES)
    return Record("s", asked, status="failed", error="OSError: no space")


def test_a_failed_uniform_quant_settles_nothing(workdir):
    """It may have kept all limits or none, at the pool where it failed."""
    q3, q2 = Uniform("Q3_K"), Uniform("Q2_K")
    kept = workdir([*winning(), failed_of(q3, 5.0)], name="kept")
    statuses = {q.format: q.status for q in uniform_quants(sweep_of(kept), Rule.of(RULE))}
    assert statuses == {"Q3_K": "open", "Q2_K": "yes"}
    native, _, _, *rest = winning()
    lossy = workdir([native, record(q2, 0.09, 0.3), *rest, failed_of(q3)], name="lossy")
    statuses = {q.format: q.status for q in uniform_quants(sweep_of(lossy), Rule.of(RULE))}
    assert statuses == {"Q3_K": "open", "Q2_K": "no"}
    text = write_report(lossy).read_text()
    assert "Lean to a uniform Q3_K quant; that is not settled." in text
    # The line of the mixes lacks a point.
    assert outcome(lossy).outcome is Outcome.OPEN and "uniform Q3_K" in outcome(lossy).why_open


def test_a_pool_whose_mixes_all_failed_is_a_case(workdir):
    folder = workdir([*winning(), *(record(p, k, m, 5.0) for p, k, m in (
        (Native(), 0.0, 0.9), (Uniform("Q3_K"), 0.02, 0.5), (Uniform("Q2_K"), 0.04, 0.2))),
        failed_of(FREQUENCY, 5.0)])  # fmt: skip
    sweep = sweep_of(folder)
    found = verdicts(sweep, Rule.of(RULE))
    assert [(v.budget_mib, v.outcome) for v in found] == [
        (2.0, Outcome.WORTH_IT), (5.0, Outcome.OPEN),
    ]  # fmt: skip
    assert (
        "| 5 MiB | Q2_K | open | – | a trial failed: frequency" in write_report(folder).read_text()
    )


def test_a_sweep_whose_trials_all_failed_says_why(workdir):
    folder = workdir([failed_of(Native()), failed_of(Uniform("Q2_K")), failed_of(FREQUENCY)])
    write_report(folder)
    assert (folder / APPENDIX).read_text().count("failed: OSError: no space") == 3


def test_a_uniform_quant_is_not_judged_by_bytes_where_all_native_experts_fit(workdir):
    fits = [record(Native(), 0.0, 0.0, 8.0), record(Uniform("Q3_K"), 0.02, 0.0, 8.0)]
    q3, _ = uniform_quants(sweep_of(workdir([*winning(), *fits])), Rule.of(RULE))
    assert (q3.format, q3.status) == ("Q3_K", "yes")
    # A pool with a slot for each expert fits them, also while its first misses are counted.
    slots = record(Native(), 0.0, 0.2)
    records = [replace(slots, metrics={**slots.metrics, "slots_total": 64}), *winning()[1:]]
    assert outcome(workdir(records, name="slots")).outcome is Outcome.NOT_NEEDED


def test_what_cannot_be_told_apart_from_chance_is_open(workdir):
    """Three draws at 0.020 to 0.022: a mix of half their KL may be chance, one above them not."""
    seeds = [record(Mixed(RANDOM, 0.5, "Q2_K"), 0.02 + 0.008 * n, 0.5, seed=n) for n in range(3)]
    few = outcome(workdir([*winning()[:-3], *seeds], name="few"))
    (clause,) = (c for c in few.best.clauses if c.name == "score")
    assert (few.outcome, clause.mark) == (Outcome.OPEN, "open")
    above = outcome(workdir(winning(kl=0.0214), name="above"))
    assert above.outcome is Outcome.AS_RANDOM


def test_few_windows_hold_no_limit_by_chance(workdir):
    """Of two windows at 0.010 and 0.045 nats a bootstrap ends at 0.045, Student's t far above."""
    mode = MissModeTrial("fetch_low", 0.8, "Q2_K")
    two = record(mode, 0.01, 0.5, windows=2, demoted=0.5)
    two = replace(two, samples={**two.samples, "kl_nats_W": [0.010, 0.045]})
    sweep = sweep_of(workdir([*winning(), two]))
    (own,) = [r for r in sweep.records if trial(r).plan == mode]
    kl, tasks, *_ = Judgement(own, sweep, Rule.of(RULE)).clauses
    low, high = map(float, re.search(r"\[(.+), (.+)\]", kl.text).groups())
    wanted = stats.ttest_1samp([0.010, 0.045], 0).confidence_interval()
    assert kl.mark == "open" and (low, high) == pytest.approx(wanted, abs=1e-4)
    # Equal answers to 32 problems exclude a loss of 0.11 and not of 0.05.
    alike = replace(own, samples={"task_sums_solved": [True] * 32})
    loss = paired.task_loss(alike, alike, "task_sums")
    assert (loss.value, loss.high) == pytest.approx((0, 1 - 0.025 ** (1 / 32)))
    assert tasks.mark == "holds"  # of 2000


def test_a_uniform_quant_that_moves_more_and_loses_more_is_no_rival(workdir):
    bad = record(Uniform("Q4_0"), 0.10, 0.55)
    sweep = sweep_of(workdir([*winning(), bad]))
    (own,) = [r for r in sweep.records if trial(r).plan == FREQUENCY]
    without = sweep_of(workdir(winning(), name="without"))
    gaps = [Judgement(own, s, Rule.of(RULE)).gap.value for s in (sweep, without)]
    assert gaps[0] == gaps[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: [p.unlink() for p in f.glob("records/*-*.json")],
            "the study s has no record",
        ),
        (lambda f: shutil.rmtree(f / "records"), "has no study under records/"),
        (lambda f: (f / "records/s.study.json").write_text("{"), "is no description of a study"),
        (lambda f: (f / "records/s.study.json").write_text("{}"), "study lacks name"),
    ],
)
def test_a_folder_without_a_sweep_is_one_clear_error(workdir, spoil, message):
    folder = workdir(winning())
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "decision.md").exists()


def test_a_rule_without_a_limit_is_an_error(workdir):
    rule = {name: value for name, value in RULE.items() if name != "kl_limit"}
    with pytest.raises(ValueError, match=r"config.rule lacks kl_limit"):
        write_report(workdir(winning(), rule=rule))


def decided(folder):
    found = verdicts(sweep_of(folder), Rule.of(RULE))
    return [(v.outcome, v.best.record, [c.text for c in v.best.clauses]) for v in found]


def test_other_policies_are_shown_and_decide_nothing(workdir):
    """Under LRU the same plans move other bytes, by which the answers would be others."""
    usual = winning()
    other = [
        replace(
            r,
            asked=replace(r.asked, policy="lru"),
            metrics={**r.metrics, "bytes_moved_per_token": 0.25 * MIB * (1 + n)},
        )
        for n, r in enumerate(usual)
    ]
    alone, both = workdir(usual, name="alone"), workdir([*usual, *other], name="both")
    assert decided(both) == decided(alone)
    rows = sweep_tables.policies(sweep_of(both)).splitlines()
    assert "MiB moved a token, slru | MiB moved a token, lru |" in rows[0]
    assert len(rows) == 2 + len(usual) and "| 1.000 | 0.250 |" in rows[2]
    write_report(both)
    assert "### Cache policies" in (both / "appendix.md").read_text()
    only = sweep_of(workdir(other, name="only"))
    assert len(only.records) == len(other) and not only.other_policies


def served(plan, kl, moved, computed, **asked):
    """A record of the study of misses, on three prompts; MiB a token."""
    base = record(plan, kl)
    spread_R = np.array([0.9, 1.0, 1.1])
    figures = {"bytes_moved": moved * MIB, "bytes_computed": computed * MIB, "host_round_trips": 2}
    samples = {f"{name}_per_token_R": (mean * spread_R).tolist() for name, mean in figures.items()}
    return replace(
        base, study="misses", asked=replace(base.asked, **asked), samples=base.samples | samples
    )


def test_ways_to_serve_a_miss(workdir, tmp_path):
    """At 4:1 native costs 2 where it is computed and Q2_K 1, so a mix at 1.5 is against half."""
    hobbit = MissModeTrial("hobbit_host", 0.1, "Q2_K")
    records = [
        served(Native(), 0.0, 1.0, 0.0),
        served(Native(), 0.0, 0.1, 2.0, misses="host"),
        served(Native(), 0.0, 0.3, 1.5, misses="hybrid", link_to_host=1.0),
        served(Uniform("Q2_K"), 0.04, 0.25, 0.0),
        served(hobbit, 0.01, 0.0, 1.5),
        served(Native(), 0.03, 0.375, 0.0, resident_lift=0.5),
    ]
    folder = tmp_path / "m"
    write_study(folder, Study("misses", "M", "q", "c", {}, {}, tuple(r.name for r in records)))
    for one in records:
        write_record(folder, one)
    found = MissStudy.of(read_study(folder, "misses"), read_records(folder))
    cell = next(cell for cell in found.cells if cell.link == 4)
    assert [label(r) for r in cell.ways(Native())] == ["native, computed", "native, fetched"]
    wanted = stats.ttest_1samp(np.array([3.6, 4.0, 4.4]), 0).confidence_interval()
    assert cell.cost(records[0]).low == pytest.approx(wanted.low)
    best, worse = cell.mixes
    assert (best.record, best.relation, worse.relation) == (records[4], "below", "above")
    kl_W, rival_W = (np.array(records[i].samples["kl_nats_W"]) for i in (4, 3))
    gap_W = kl_W - rival_W / 2
    ends = stats.ttest_1samp(gap_W, 0).confidence_interval(1 - 0.05 / 2)
    assert (best.gap.low, best.gap.high) == pytest.approx((ends.low, ends.high))
    row = next(line for line in cheapest(found).splitlines() if "4:1" in line)
    assert "| 4.00 [3.01, 4.99] | 2.00, computed | 1.00, fetched | hobbit_host with Q2_K" in row
    alike = next(cell for cell in found.cells if cell.link == 1)
    assert [label(r)[8:] for r in alike.ways(Native())] == ["fetched", "divided", "computed"]
    rows = all_ways(found).splitlines()
    split = replace(records[4].asked, plan=MissModeTrial("hobbit", "adaptive", "Q2_K"))
    by_use = replace(records[4], asked=split)
    assert label(by_use) == "hobbit with Q2_K, the pool divided by use"
    half = replace(by_use, asked=replace(split, plan=MissModeTrial("hobbit", 0.5, "Q2_K")))
    assert sorted([by_use, half], key=order) == [half, by_use]
    assert len(rows) == 2 + len(records) and "| 1.50 [1.13, 1.87] | – | – |" in rows[4]
    assert found.count("below") == 2
    # At 16:1 the lifted mix costs 6, and native computed 2 without a loss.
    dear = next(mix for mix in found.cells[2].mixes if mix.record == records[5])
    assert dear.gap.value == pytest.approx(np.mean(records[5].samples["kl_nats_W"]))
    alone = write_report(folder).read_text()  # without a sweep beside it
    assert alone.startswith("# M") and "| 2.00, computed | 1.00, fetched | hobbit_host" in alone
    for one in winning():
        write_record(folder, one)
    write_study(folder, read_study(workdir(winning()), "s"))
    write_report(folder)
    assert "hobbit_host with Q2_K, 10 % of the pool" in (folder / LETTER).read_text()
    assert "native, routed toward residents by 0.5, fetched" in (folder / APPENDIX).read_text()


def test_two_sweeps_side_by_side(workdir):
    ours = sweep_of(workdir(winning(), name="ours"))
    other = sweep_of(workdir(winning(kl=0.014), name="other"))
    text = render_against(ours, other, ("ours", "other"))
    row = next(line for line in text.splitlines() if line.startswith("| frequency"))
    assert "| 0.0100 | 0.0139 |" in row and "| -0.0039 [-0.0050, -0.0028] |" in row
    assert "7 trials are in both" in text and "Inputs, sizes and device are the same." in text
    third = [replace(r, asked=replace(r.asked, budget_mib=9.0)) for r in winning()]
    with pytest.raises(ValueError, match="no trial of ours is in third"):
        render_against(ours, sweep_of(workdir(third, name="third")), ("ours", "third"))


@pytest.mark.parametrize(("name", "read"), EXPORTS)
def test_every_kept_record_can_be_exported(tmp_path, request, name, read):
    """Those whose plan is a list of numbers too, and settings of several types in one column."""
    found = read_records(request.config.rootpath / "docs")
    assert export(found, tmp_path / name) == len(found.found)
    frame = read(tmp_path / name)
    assert list(frame["name"]) == [record.name for record in found.found]
    assert "0.67, 0.3, 0.03" in set(frame["asked.plan.shares"].dropna())


@pytest.mark.slow
def test_the_script_writes_exports_and_refuses(workdir, request, tmp_path):
    script = request.config.rootpath / "scripts" / "report.py"

    def run(*args):
        command = [sys.executable, script, "--workdir", folder, *args]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    folder = workdir(winning())
    assert run().stdout == f"{folder / 'decision.md'}\n"
    for name, read in EXPORTS:
        assert run("--export", tmp_path / name).stdout.startswith("7 records: ")
        frame = read(tmp_path / name)
        wanted = {r.name: r.metrics["kl_mean_nats"] for r in winning()}
        assert dict(zip(frame["name"], frame["kl_mean_nats"], strict=True)) == pytest.approx(wanted)
        assert set(frame["asked.plan.kind"]) == {"native", "uniform", "mixed"}
    assert run("--against", folder).stdout == f"{folder / 'against.md'}\n"
    for args in (("--export", "t.xml"), ("--against", tmp_path)):
        done = run(*args)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1, json.dumps(done.stderr)
