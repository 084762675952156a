"""The decision document: it obeys the rule, hides nothing, and depends on the rows alone."""

import json
import logging
import subprocess
import sys

import pytest

from hobbit_jax.report import write_report
from hobbit_jax.report.comparisons import (
    bound_tokens_per_second,
    compare_speed,
    control_gap,
    line_gap,
)
from hobbit_jax.report.document import render
from hobbit_jax.report.read_results import load_results
from hobbit_jax.report.verdict import Outcome, Rule, verdicts

MIB = 2**20
RULE = {
    "kl_limit": 0.05,
    "speedup_needed": 1.2,
    "bytes_moved_ratio_needed": 0.7,
    "task_loss_limit": 0.05,
    "pcie_gb_s": 25.0,
    "device_gb_s": 504.0,
    "card": "12 GB desktop card",
}
SIZES = {"native": 7.27, "Q3_K": 5.2, "Q2_K": 4.1}


def about(value, spread):
    return {"value": value, "low": value - spread, "high": value + spread}


def make_row(
    signal,
    low_format=None,
    fraction=0.0,
    budget=2.0,
    *,
    kl=0.0,
    kl_spread=0.001,
    moved=1.0,
    size=None,
    tasks=0.6,
    speed=50.0,
    speed_spread=1.0,
    device="cpu: Some Processor",
    seed=0,
    degraded=None,
    mode=None,
):
    fraction = {"native": 0.0, "uniform": 1.0}.get(signal, fraction)
    native = SIZES["native"]
    if size is None:
        low = SIZES[low_format or "native"]
        size = native + fraction * (low - native)
        if signal == "router_weight":
            size = native + low
    cell = f"{mode or signal}-{low_format}-{100 * fraction:g}-{budget:g}mib-s{seed}"
    score = None if tasks is None else {"problems": 100, "correct": 60, **about(tasks, 0.09)}
    return {
        "cell": cell,
        "status": "ok",
        "error": None,
        "config": {
            "signal": signal,
            "low_fraction": fraction,
            "low_format": low_format,
            "budget_mib": budget,
            "seed": seed,
            "protected_fraction": 0.1,
            "inputs": {"model": ""},
            **({"mode": mode, "low_share": 0.8} if mode else {}),
        },
        "quality": {
            "tokens": 32768,
            "bits_per_byte": about(1.88 + kl, 0.02),
            "perplexity": about(30.0 + kl, 1.0),
            "kl_mean": about(kl, kl_spread if kl else 0.0),
            "kl_p99": about(10 * kl, 0.01),
            "top1_agreement": about(1 - 3 * kl, 0.004),
        },
        "tasks": None if tasks is None else {"arithmetic": score, "functions": score},
        "store": {
            "experts": 64,
            "native_bytes": int(native * MIB),
            "plan_bytes": int(size * MIB),
            "expert_bytes_mean": size * MIB / 64,
        },
        "pool": {
            "budget_bytes": int(budget * MIB),
            "device_bytes": int(budget * MIB) - 4096,
            "slots": {"Q4_K": 10, "Q4_K/Q6_K": 9},
            "slots_total": 19,
            "resident_pairs": 19,
            "dense_device_bytes": 1,
            "kv_cache_bytes": 1,
        },
        "decode": {
            "tokens": 288,
            "hit_rate": 0.5,
            "degraded_fraction": fraction if degraded is None else degraded,
            "bytes_moved_per_token": moved * MIB,
            "bytes_used_per_token": 2.0 * MIB,
            "tokens_per_second": about(speed, speed_spread),
            "repeat_seconds": [1.9, 2.0, 2.1],
            "first_token_s": 0.1,
        },
        "routing": (
            {
                "selections_LE": [
                    [100 + 7 * e * (layer + 1) for e in range(16)] for layer in range(4)
                ]
            }
            if signal == "native"
            else None
        ),
        "provenance": {
            "git_revision": "abc123",
            "model_sha256": "m" * 64,
            "tier_sha256": {low_format: "t" * 64} if low_format else {},
            "text_sha256": "x" * 64,
            "device": device,
            "versions": {"jax": "0.10.2", "python": "3.11.7"},
            "seconds": 12.5,
        },
    }


def winning_rows(**mixed):
    """A sweep whose frequency plan meets every clause; `mixed` changes that plan."""
    shared = {"device": mixed.get("device", "cpu: Some Processor")}
    candidate = {"kl": 0.010, "moved": 0.5, "speed": 70.0, **mixed}
    return [
        make_row("native", moved=1.0, **shared),
        make_row("uniform", "Q3_K", kl=0.014, moved=0.7, **shared),
        make_row("uniform", "Q2_K", kl=0.041, moved=0.4, **shared),
        make_row("frequency", "Q2_K", 0.5, **candidate),
        make_row("random", "Q2_K", 0.5, kl=0.026, moved=0.6, **shared),
    ]


def big_rows():
    rows = []
    for budget, hits in ((1.0, 1.0), (2.0, 0.6), (4.0, 0.2), (8.0, 0.0)):
        moved = 1.6 * hits
        rows.append(make_row("native", budget=budget, moved=moved, speed=60 - 20 * hits))
        for low, kl, ratio in (("Q3_K", 0.014, 0.65), ("Q2_K", 0.041, 0.5)):
            share = {"budget": budget, "speed": 60 - 15 * hits}
            rows.append(make_row("uniform", low, kl=kl, moved=moved * ratio, **share))
            for fraction in (0.25, 0.5, 0.75, 0.9):
                signals = ("router_weight", "frequency", "accumulated_weight", "random")
                for index, signal in enumerate(signals):
                    rows.append(
                        make_row(
                            signal,
                            low,
                            fraction,
                            kl=kl * fraction * (0.4 + 0.25 * index),
                            kl_spread=0.06 * kl,
                            moved=moved * (1 - (1 - ratio) * fraction),
                            **share,
                        )
                    )
    return rows


@pytest.fixture
def workdir(tmp_path):
    """Returns a function that writes rows as a sweep's folder."""

    def write(rows, cells=None, name="sweep"):
        folder = tmp_path / name
        (folder / "rows").mkdir(parents=True)
        for row in rows:
            (folder / "rows" / f"{row['cell']}.json").write_text(json.dumps(row))
        sweep = {
            "title": "Reference model, demo sweep",
            "question": "Is it worth it?",
            "command": "python scripts/sweep.py --config configs/reference.py:demo",
            "config": {"seed": 0, "cache": {"budget_mib": [1, 2]}},
            "rule": RULE,
            "cells": [row["cell"] for row in rows] if cells is None else cells,
        }
        (folder / "sweep.json").write_text(json.dumps(sweep))
        return folder

    return write


def only_verdict(folder):
    results = load_results(folder)
    (verdict,) = verdicts(results, Rule.of(results.rule))
    return verdict


def judged(folder, signal="frequency"):
    (found,) = [j for j in only_verdict(folder).judgements if j.row.plan.signal == signal]
    return found


def mark(judgement, name):
    (found,) = [c.mark for c in judgement.conditions if c.name == name]
    return found


def without(rows, signal, *path):
    """The rows with one value of `signal`'s rows set to null."""
    for row in rows:
        if row["config"]["signal"] == signal:
            block = row
            for key in path[:-1]:
                block = block[key]
            block[path[-1]] = None
    return rows


def test_all_clauses_hold(workdir):
    verdict = only_verdict(workdir(winning_rows()))
    assert verdict.best.outcome is Outcome.WORTH_IT
    assert verdict.best.row.plan.signal == "frequency"
    names = [c.name for c in verdict.best.decisive]
    assert names == ["KL", "tasks", "bytes moved", "rivals", "signal"]
    assert mark(verdict.best, "speed") == "skipped"


@pytest.mark.parametrize(
    ("change", "failing", "outcome"),
    [
        # 2 bit of one uniform plan is both smaller and nearer to native here: two clauses fail.
        ({"kl": 0.0495, "kl_spread": 0.001}, ["KL", "rivals", "signal"], Outcome.NO),
        ({"tasks": 0.5}, ["tasks"], Outcome.NO),
        ({"moved": 0.71, "kl": 0.010}, ["bytes moved"], Outcome.NO),
        ({"kl": 0.041, "moved": 0.41}, ["rivals", "signal"], Outcome.NO),
        ({"kl": 0.0255}, ["signal"], Outcome.SMALLER_EXPERTS),
    ],
)
def test_each_clause_decides(workdir, change, failing, outcome):
    judgement = judged(workdir(winning_rows(**change)))
    assert judgement.outcome is outcome
    assert [c.name for c in judgement.decisive] == failing


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kl": 0.049, "kl_spread": 0.001}, "KL"),
        ({"tasks": 0.55}, "tasks"),
        ({"moved": 0.7}, "bytes moved"),
    ],
)
def test_a_limit_reached_exactly_holds(workdir, change, name):
    assert mark(judged(workdir(winning_rows(**change))), name) == "holds"


def test_a_token_level_plan_is_compared_at_the_bytes_of_both_copies(workdir):
    rows = winning_rows()
    rows[3] = make_row("router_weight", "Q2_K", 0.5, kl=0.014, moved=0.7)
    judgement = judged(workdir(rows), "router_weight")
    assert [c.name for c in judgement.decisive] == ["rivals"]
    assert "uniform Q3_K" in judgement.decisive[0].text


def test_a_uniform_rival_that_moves_more_does_not_dominate(workdir):
    rows = winning_rows(kl=0.014, size=5.3)  # larger than uniform Q3_K, no better, moves less
    assert judged(workdir(rows)).outcome is Outcome.WORTH_IT


def test_uniform_quants_within_the_same_limits_are_named_beside_a_winner(workdir):
    folder = workdir(winning_rows())
    verdict = only_verdict(folder)
    assert [plan.low_format for plan in verdict.simpler] == ["Q2_K", "Q3_K"]
    (line,) = [x for x in write_report(folder).read_text().splitlines() if "| 2 MiB | Q2_K |" in x]
    assert line.endswith("| equal within the intervals | uniform Q2_K, uniform Q3_K |")


def test_native_that_misses_nothing_needs_no_mixing(workdir):
    rows = winning_rows(moved=0.0)
    rows[0] = make_row("native", moved=0.0)
    verdict = only_verdict(workdir(rows))
    assert verdict.best.outcome is Outcome.NOT_NEEDED
    assert [c.name for c in verdict.best.decisive] == ["bytes moved"]


def test_absent_tasks_are_skipped_and_said(workdir):
    rows = [{**row, "tasks": None} for row in winning_rows()]
    folder = workdir(rows)
    assert only_verdict(folder).best.outcome is Outcome.WORTH_IT
    assert mark(judged(folder), "tasks") == "skipped"
    assert "No task was scored" in write_report(folder).read_text()


@pytest.mark.parametrize(
    ("signal", "path"),
    [
        ("frequency", ("quality",)),
        ("frequency", ("quality", "kl_mean")),
        ("frequency", ("decode",)),
        ("native", ("decode", "bytes_moved_per_token")),
        ("random", ("quality",)),
    ],
)
def test_what_was_not_measured_leaves_the_verdict_open(workdir, signal, path):
    folder = workdir(without(winning_rows(), signal, *path))
    assert judged(folder).outcome is Outcome.OPEN
    assert "–" in write_report(folder).read_text()


def test_one_known_disadvantage_of_each_rival_settles_the_clause(workdir):
    # Uniform plans have a worse KL and native moves more, whatever the bytes are.
    folder = workdir(without(winning_rows(), "frequency", "store"))
    assert mark(judged(folder), "rivals") == "holds"


def test_a_missing_or_failed_uniform_rival_leaves_the_verdict_open(workdir):
    rows = [row for row in winning_rows() if row["config"]["signal"] != "uniform"]
    assert judged(workdir(rows, name="missing")).outcome is Outcome.OPEN
    rows = winning_rows(size=7.0)
    rows[1] = {**rows[1], "status": "failed", "error": "MemoryError: no", "quality": None}
    judgement = judged(workdir(rows, name="failed"))
    assert judgement.outcome is Outcome.OPEN
    assert "uniform Q3_K" in judgement.decisive[0].text


def test_speed_counts_on_a_gpu_only(workdir):
    gpu = {"device": "gpu: NVIDIA H200"}
    fast = judged(workdir(winning_rows(**gpu), name="fast"))
    slow = judged(workdir(winning_rows(speed=55.0, **gpu), name="slow"))
    equal = judged(workdir(winning_rows(speed=62.0, speed_spread=12.0, **gpu), name="equal"))
    assert (mark(fast, "speed"), fast.outcome) == ("holds", Outcome.WORTH_IT)
    assert (mark(slow, "speed"), slow.outcome) == ("fails", Outcome.NO)
    assert "equal within the spread" in equal.decisive[-1].text


@pytest.mark.parametrize(
    ("device", "on_gpu"),
    [
        ("gpu: NVIDIA H200", True),
        ("cuda:0", True),
        ("cpu: AMD EPYC with Radeon Graphics", False),
        ("TFRT_CPU_0", False),
        ("x86 server, no GPU", False),
        (None, False),
    ],
)
def test_which_devices_are_gpus(workdir, device, on_gpu):
    (row,) = load_results(workdir([make_row("native", device=device)])).rows
    assert row.on_gpu is on_gpu


def test_timings_that_touch_or_have_no_spread_or_another_device(workdir):
    rows = winning_rows(speed=51.9)
    rows[1]["decode"]["repeat_seconds"] = [2.0]
    rows[2]["provenance"]["device"] = "gpu: NVIDIA H200"
    results = load_results(workdir(rows))
    native, *others = results.rows
    found = {results.label(row.plan): compare_speed(row, native) for row in others}
    assert found == {
        "uniform Q3_K": None,
        "uniform Q2_K": None,
        "frequency 50 % Q2_K": "equal",
        "random 50 % Q2_K": "equal",
    }


def test_a_signal_must_be_apart_from_every_seed_of_the_control(workdir):
    rows = winning_rows()
    rows.append(make_row("random", "Q2_K", 0.5, kl=0.0115, moved=0.6, seed=1))
    results = load_results(workdir(rows))
    (plan,) = [p for p in results.plans if p.signal == "frequency"]
    gap = control_gap(plan, results)
    assert gap is not None
    assert gap.relation == "not separate"
    assert gap.control.value == pytest.approx((0.026 + 0.0115) / 2)
    labels = [results.label(p) for p in results.plans]
    assert "random 50 % Q2_K (seed 1)" in labels
    assert "frequency 50 % Q2_K" in labels


@pytest.mark.parametrize(
    ("kl", "degraded", "control", "relation"),
    [
        (0.002, 0.25, 0.015, "below"),  # halfway between native and the random half
        (0.0145, 0.25, 0.015, "not separate"),
        (0.05, 0.75, 0.04, "above"),  # halfway between the random half and uniform
    ],
)
def test_residency_is_held_against_a_random_choice_of_as_many_uses(
    workdir, kl, degraded, control, relation
):
    rows = [
        make_row("native"),
        make_row("uniform", "Q2_K", kl=0.05),
        make_row("random", "Q2_K", 0.6, kl=0.03, degraded=0.5),
        make_row("residency", "Q2_K", kl=kl, degraded=degraded, mode="fetch_low", moved=0.5),
        # Of another format and of another budget: no control of this one.
        make_row("random", "Q3_K", 0.6, kl=0.001, degraded=degraded),
        make_row("random", "Q2_K", 0.6, 4.0, kl=0.03, degraded=degraded),
    ]
    results = load_results(workdir(rows))
    (plan,) = (plan for plan in results.plans if plan.residency)
    gap = control_gap(plan, results)
    assert gap and gap.control.value == pytest.approx(control) and gap.relation == relation
    assert results.label(plan) == "fetch_low Q2_K"
    text = render(results, Rule.of(RULE), verdicts(results, Rule.of(RULE)))
    assert f"| Q2_K | {100 * degraded:.0f} % | fetch_low Q2_K |" in text


@pytest.mark.parametrize(
    ("kl", "relation"),
    [(0.005, "better"), (0.0115, "equal within the intervals"), (0.03, "worse")],
)
def test_line_between_uniform_neighbours(workdir, kl, relation):
    results = load_results(workdir(winning_rows(kl=kl)))
    (plan,) = [p for p in results.plans if p.signal == "frequency"]
    gap = line_gap(plan, results)
    share = (SIZES["native"] - 5.685) / (SIZES["native"] - SIZES["Q3_K"])
    assert gap.line is not None
    assert gap.line.value == pytest.approx(0.014 * share, rel=1e-4)
    assert gap.relation == relation


def test_a_plan_larger_than_native_has_no_line(workdir):
    results = load_results(workdir(winning_rows(size=11.0)))
    (plan,) = [p for p in results.plans if p.signal == "frequency"]
    assert line_gap(plan, results).relation == "larger than native"


def test_bound_is_the_slower_of_the_two_streams(workdir):
    native = load_results(workdir(winning_rows())).rows[0]
    assert bound_tokens_per_second(native, 504.0, 25.0) == pytest.approx(25e9 / MIB)
    assert bound_tokens_per_second(native, 10.0, 25.0) == pytest.approx(10e9 / (2 * MIB))


def test_same_rows_same_bytes(workdir):
    first = workdir(big_rows(), name="a")
    second = workdir(list(reversed(big_rows())), name="b")
    names = ["decision.md", *(f"figures/{path.name}" for path in sorted_figures(first))]
    assert len(names) == 4
    for name in names:
        data = (first / name).read_bytes()
        assert data == (write_report(second).parent / name).read_bytes(), name
        assert b"Software" not in data
    before = {name: (first / name).read_bytes() for name in names}
    write_report(first)
    assert before == {name: (first / name).read_bytes() for name in names}
    assert not list(first.rglob("*.partial"))


def sorted_figures(folder):
    return sorted((write_report(folder).parent / "figures").iterdir())


def test_the_document_of_a_full_sweep(workdir):
    text = write_report(workdir(big_rows())).read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert [title.split(".")[0] for title in titles] == [f"## {n}" for n in range(1, 9)]
    assert "### Budget 1 MiB" in text
    assert "not needed at this budget" in text
    assert "larger than native" in text
    assert "None: all 140 cells have a row." in text
    assert "nan" not in text.lower().replace("nano", "")
    for line in text.splitlines():
        assert line == line.rstrip(), line


def test_absent_cells_are_listed_and_never_invented(workdir, caplog):
    rows = winning_rows()
    rows[2] = {
        "cell": rows[2]["cell"],
        "status": "failed",
        "error": "ValueError: budget of 1 MiB\nholds no | step",
        "config": rows[2]["config"],
        "provenance": {},
    }
    cells = [row["cell"] for row in rows] + ["never-ran", "corrupt", "nan", "stray-name", "list"]
    rows.append({**make_row("frequency", "Q3_K", 0.5), "cell": "of-an-earlier-config"})
    folder = workdir(rows, cells)
    (folder / "rows" / "corrupt.json").write_text('{"cell": "corr')
    (folder / "rows" / "nan.json").write_text('{"cell": "nan", "status": "ok", "x": NaN}')
    (folder / "rows" / "list.json").write_text("[]")
    (folder / "rows" / "stray-name.json").write_text('{"cell": "other", "status": "ok"}')
    (folder / "rows" / ".half.json.7.partial").write_text("{")
    with caplog.at_level(logging.WARNING, logger="absl"):
        text = write_report(folder).read_text()
    section = text[text.index("## 6.") : text.index("## 7.")]
    assert "holds no \\| step" in section
    for cell, state in (
        (rows[2]["cell"], "failed"),
        ("never-ran", "missing"),
        ("corrupt", "unreadable"),
        ("nan", "unreadable"),
        ("list", "unreadable"),
        ("stray-name", "unreadable"),
    ):
        assert f"| {cell} | {state} |" in section
    assert "`of-an-earlier-config`" in section
    assert "6 of 10 cells have no usable row" in text
    assert "Q3_K" not in {row.plan.low_format for row in load_results(folder).rows[2:]}


def test_wrong_types_in_a_row_are_unreadable(workdir):
    rows = winning_rows()
    rows[0]["decode"]["hit_rate"] = "high"
    rows[1]["config"]["low_fraction"] = 7
    rows[2]["provenance"]["versions"] = "new"
    rows[3]["quality"]["kl_mean"] = {"value": 1.0, "low": 2.0, "high": 0.0}
    rows[4]["tasks"] = [1]
    results = load_results(workdir(rows))
    assert not results.rows
    assert len(results.unreadable) == 5
    text = render(results, Rule.of(results.rule), [])
    assert "**No answer.**" in text


def test_only_failed_rows_give_a_document_without_an_answer_or_figures(workdir):
    rows = [{"cell": "a", "status": "failed", "error": None, "config": None}]
    folder = workdir(rows)
    (folder / "figures").mkdir()
    (folder / "figures" / "expert_use.png").write_bytes(b"of an earlier run")
    text = write_report(folder).read_text()
    assert "**No answer.**" in text
    assert "no error recorded" in text
    assert not list((folder / "figures").iterdir())


def test_plans_whose_kl_depends_on_the_budget_are_a_threat(workdir):
    rows = [*winning_rows(), make_row("frequency", "Q2_K", 0.5, 4.0, kl=0.02)]
    assert "differs between budgets" in write_report(workdir(rows)).read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: [p.unlink() for p in (f / "rows").iterdir()], "holds no row"),
        (lambda f: (f / "sweep.json").unlink(), "sweep.json is absent"),
        (lambda f: (f / "sweep.json").write_text("{"), "not the record of a sweep"),
        (lambda f: (f / "sweep.json").write_text("{}"), "title is None"),
    ],
)
def test_a_folder_without_a_sweep_is_one_clear_error(workdir, spoil, message):
    folder = workdir(winning_rows())
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "decision.md").exists()


def test_a_rule_without_a_limit_is_an_error(workdir):
    folder = workdir(winning_rows())
    sweep = json.loads((folder / "sweep.json").read_text())
    del sweep["rule"]["kl_limit"]
    (folder / "sweep.json").write_text(json.dumps(sweep))
    with pytest.raises(ValueError, match="kl_limit"):
        write_report(folder)


def test_the_script(workdir, request):
    script = request.config.rootpath / "scripts" / "report.py"
    folder = workdir(winning_rows())
    done = subprocess.run(
        [sys.executable, script, "--workdir", folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{folder / 'decision.md'}\n"
    done = subprocess.run(
        [sys.executable, script, "--workdir", folder / "rows"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
