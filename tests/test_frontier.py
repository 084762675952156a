"""The quality frontier: a cell on a real engine, and what the report makes of rows, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from launch_harness import run_sweep

from hobbit_jax.experts.store import NATIVE
from hobbit_jax.record import (
    EvalSizes,
    Inputs,
    MissModeTrial,
    MixedInBytes,
    Native,
    PerSelection,
    QualityTrial,
    Record,
    Study,
    Uniform,
    measured,
    read_record,
    read_records,
    read_study,
    write_record,
    write_study,
)
from hobbit_jax.report.answers import within
from hobbit_jax.report.document import write_report
from hobbit_jax.report.frontier import Frontier, frontiers
from hobbit_jax.report.frontier_tables import by_text, problems
from hobbit_jax.report.table import figure
from hobbit_jax.statistics import share
from hobbit_jax.sweep.trial import Trial

DESCRIPTION = {"title": "t", "question": "?", "command": "c", "config": {}, "rule": {}}
TEXT = "Whenever it is a damp, drizzly November in my soul; whenever I find myself. "
SIZES = EvalSizes(windows=3, context=24, calibration_windows=3)


FORMATS, SHIPPED = ("Q3_K", "Q2_K"), Inputs()
PART = Uniform("Q2_K", roles=("gate", "up"))


def cell(plan, seed=0, inputs=SHIPPED) -> Trial:
    return Trial(QualityTrial(plan, inputs, SIZES, seed), "frontier")


@pytest.mark.slow
def test_cells_on_an_engine(two_banks_path, tmp_path):
    """Bytes within the limit, selections counted, each cell a row."""
    for name in ("calibration", "evaluation"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: {TEXT}" * 12)
    inputs = Inputs(
        str(two_banks_path), str(tmp_path / "calibration.txt"), str(tmp_path / "evaluation.txt")
    )
    plans = (
        Native(),
        Uniform("Q2_K", "gptq"),
        MixedInBytes("sensitivity", 0.7, FORMATS),
        MixedInBytes("random", 0.7, FORMATS),
        PerSelection("cumulative_weight", (0.5, 0.3, 0.2), ("Q2_K",)),
    )
    cells = [cell(plan, inputs=inputs) for plan in plans]
    ran, _, failed = run_sweep(cells, DESCRIPTION, tmp_path / "w")
    assert (ran, failed) == (5, 0)
    records = [read_record(tmp_path / "w", c.name) for c in cells]
    native, uniform, sensitive, random, hobbit = records
    assert native.metrics["kl_mean_nats"] < 1e-6
    selections = 3 * 24 * 3 * 2  # windows · tokens · layers · experts per token
    assert all(r.metrics["selections"] == selections for r in records)
    assert uniform.samples["precision_shares"] == [0.0, 1.0]
    for mix in (sensitive, random):
        assert mix.metrics["stored_bytes"] <= 0.7 * mix.metrics["native_bytes"]
        assert mix.metrics["stored_bytes"] > 0.66 * mix.metrics["native_bytes"]
    assert sensitive.samples["precision_LE"] != random.samples["precision_LE"]
    assert hobbit.metrics["skipped_share"] == pytest.approx(0.2, abs=0.08)
    assert hobbit.samples["precision_shares"][NATIVE] == pytest.approx(0.5, abs=0.08)
    assert hobbit.metrics["kl_mean_nats"] > 0
    assert len(hobbit.samples["kl_nats_W"]) == 3
    assert run_sweep(cells, DESCRIPTION, tmp_path / "w") == (0, 5, 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (MixedInBytes("loudest", 0.5, FORMATS), "importance score is 'loudest'; want one of "),
        (
            PerSelection("frequency", (0.5, 0.5), ("Q2_K",)),
            "importance score is 'frequency'; want one of ",
        ),
        (Uniform("Q2_K", "best"), "method is 'best'; want one of ggml, gptq"),
        (PerSelection("router_weight", (1.0,), ("Q2_K",)), r"1 formats with shares \(1.0,\)"),
        (MissModeTrial("hobbit", 1.5, "Q2_K"), "share is 1.5; want adaptive or 0 to 1"),
    ],
)
def test_refuses_a_cell_without_meaning(plan, message):
    with pytest.raises(ValueError, match=message):
        cell(plan)


# ------------------------------------------------------------------- the report, on made-up records

WINDOWS, NATIVE_BYTES = 40, 1000
NOISE_W = np.random.default_rng(0).gamma(2.0, 0.5, WINDOWS)  # what windows have in common


def make(plan, level: float, stored_bytes: int, seed=0) -> Record:
    kl_W = level * NOISE_W * np.random.default_rng(seed).uniform(0.98, 1.02, WINDOWS)
    metrics = {
        "evaluation_tokens": WINDOWS * 512, "kl_mean_nats": float(kl_W.mean()),
        "native_bytes": NATIVE_BYTES, "stored_bytes": stored_bytes, "perplexity": 20.0,
        "bytes_read_per_selection": stored_bytes / 10, "skipped_share": 0, "top1_agreement": 0.9,
    }  # fmt: skip
    samples = {"kl_nats_W": kl_W.tolist(), "precision_shares": [1.0]}
    return Record("frontier", QualityTrial(plan, Inputs(), SIZES, seed), metrics, samples)


@pytest.fixture
def workdir(tmp_path):
    """Sensitivity beats the control by 2 %, far within its interval but not within the pairs."""
    records = [make(Native(), 0.0, NATIVE_BYTES)]
    for seed in (0, 1, 2):
        records += [
            make(Uniform("Q3_K", "gptq"), 0.02, 700, seed),
            make(Uniform("Q2_K", "gptq"), 0.06, 500, seed),
            make(Uniform("Q2_K", "ggml"), 0.12, 500, seed),
            make(MixedInBytes("sensitivity", 0.6, FORMATS, "gptq"), 0.0392, 600, seed),
            make(MixedInBytes("random", 0.6, FORMATS, "gptq"), 0.04, 600, seed),
        ]
    names = (*(record.name for record in records), "never-ran")
    write_study(tmp_path, Study("frontier", "T", "Q?", "python x", {}, {}, names))
    for record in records:
        write_record(tmp_path, record)
    return tmp_path


def load(workdir) -> Frontier:
    (found,) = frontiers(read_study(workdir, "frontier"), read_records(workdir))
    return found


def test_pairs_tell_apart_what_intervals_do_not(workdir):
    frontier = load(workdir)
    of = {(p.score, p.encoder, p.formats[-1:]): p for p in frontier.plans}
    score, random = of["sensitivity", "gptq", ("Q2_K",)], of["random", "gptq", ("Q2_K",)]
    assert score.seeds == random.seeds == (0, 1, 2)
    assert score.kl.low < random.kl.low < score.kl.high  # they overlap
    difference = frontier.difference(score, random)
    assert difference.value == pytest.approx(score.kl.value - random.kl.value)
    assert difference.low < difference.value < difference.high < 0

    # Half way between Q2_K at 500 bytes and Q3_K at 700.
    line = frontier.line(random)
    wanted_SW = (
        of["uniform", "gptq", ("Q2_K",)].kl_SW + of["uniform", "gptq", ("Q3_K",)].kl_SW
    ) / 2
    np.testing.assert_allclose(line.kl_SW, wanted_SW, rtol=1e-12)
    assert frontier.n_absent == 1


def test_a_seed_that_a_uniform_quant_lacks_is_left_out_of_the_line(workdir):
    """A study under way: the mixes have three seeds, Q3_K has the first and the last."""
    study = read_study(workdir, "frontier")
    (workdir / "records" / f"{make(Uniform('Q3_K', 'gptq'), 0.02, 700, 1).name}.json").unlink()
    frontier = load(workdir)
    (random,) = (p for p in frontier.plans if p.score == "random")
    line = frontier.line(random)
    of = {p.formats[-1:]: p for p in frontier.uniform if p.encoder == "gptq"}
    wanted_SW = (of["Q2_K",].kl_SW[[0, 2]] + of["Q3_K",].kl_SW) / 2
    assert line.seeds == (0, 2) and len(study.trials) - 2 == len(read_records(workdir).found)
    np.testing.assert_allclose(line.kl_SW, wanted_SW, rtol=1e-12)
    assert frontier.difference(random, line).value == pytest.approx(
        random.kl_SW[[0, 2]].mean() - wanted_SW.mean()
    )
    write_report(workdir)


def test_each_evaluation_text_has_its_own_section(workdir):
    own = read_records(workdir).found
    other = [
        replace(
            r,
            asked=replace(r.asked, inputs=Inputs(evaluation_text="prose")),
            samples={**r.samples, "kl_nats_W": [2 * kl for kl in r.samples["kl_nats_W"]]},
        )
        for r in own
        if isinstance(r.asked.plan, Native | Uniform)
    ]
    part = replace(other[-1], asked=replace(other[-1].asked, plan=PART, seed=0))
    for record in (*other, part):
        write_record(workdir, record)
    names = tuple(r.name for r in (*own, *other, part))
    write_study(workdir, replace(read_study(workdir, "frontier"), trials=names))
    shipped, prose = frontiers(read_study(workdir, "frontier"), read_records(workdir))
    assert (shipped.evaluation_text, prose.evaluation_text) == ("", "prose")
    for plan in prose.uniform:
        twin = shipped.by_plan[plan.plan, plan.text]
        np.testing.assert_allclose(plan.kl_SW, 2 * twin.kl_SW)
    assert PART in [p.plan for p in prose.plans] and PART not in [p.plan for p in prose.uniform]
    text = write_report(workdir).read_text(encoding="utf-8")
    assert (
        "# T\n" in text
        and "# T, on prose\n" in text
        and "| Q2_K, ggml, gate and up alone |" in text
    )


def test_the_rival_is_ggmls_best_of_no_more_bytes(workdir):
    """IQ2_S is smaller and better than Q2_K, Q3_K better and larger."""
    for plan, level, stored_bytes in (
        (Uniform("IQ2_S", "ggml"), 0.08, 480),
        (Uniform("Q3_K", "ggml"), 0.03, 700),
    ):
        write_record(workdir, make(plan, level, stored_bytes))
    study = read_study(workdir, "frontier")
    names = tuple(r.name for r in read_records(workdir).found)
    write_study(workdir, replace(study, trials=names))
    frontier = load(workdir)
    of = {p.plan: p for p in frontier.uniform}
    own, rival = of[Uniform("Q2_K", "gptq")], of[Uniform("IQ2_S", "ggml")]
    assert frontier.best_of_ggml(own) is rival
    found = frontier.over_ggml(own)
    own_W, rival_W = own.kl_SW[0], rival.kl_SW[0]  # the one seed in common
    assert found.value == pytest.approx(own_W.mean() / rival_W.mean())
    rng = np.random.default_rng(7)
    draws = [own_W[i].mean() / rival_W[i].mean() for i in rng.integers(40, size=(4000, 40))]
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=2e-3)
    assert frontier.over_ggml(rival) is None
    assert sorted(within([frontier], 0.05)) == ["Q3_K by ggml", "Q3_K by gptq"]
    kept = of[Uniform("Q3_K", "gptq")].kl
    assert within([frontier], kept.high) == ["Q3_K by gptq"]
    assert within([frontier], (kept.value + kept.high) / 2) == []
    row = next(line for line in by_text([frontier]).splitlines() if "Q2_K, gptq" in line)
    assert row.endswith(f"| {figure(found, '.2f')} |")


def test_problems_are_compared_one_by_one(workdir):
    """McNemar's test by hand: all splits of the problems that one of two solves, counted."""
    solved = {
        Native(): [True] * 9 + [False],
        Uniform("Q2_K", "gptq"): [True] * 8 + [False] * 2,
        Uniform("IQ2_S", "ggml"): [False] * 7 + [True] * 3,
        Uniform("IQ2_XS", "ggml"): [False] * 10,
        Uniform("Q3_K", "ggml"): [True] * 10,
    }
    stored = {"Q3_K": 700, "Q2_K": 500, "IQ2_S": 480, "IQ2_XS": 460}
    sizes = replace(SIZES, windows=0, benchmarks=("humaneval",))
    for plan, right in solved.items():
        found = vars(share(sum(right), len(right)))
        bytes_ = {
            "native_bytes": 1000,
            "stored_bytes": stored.get(getattr(plan, "format", ""), 1000),
        }
        found = measured(
            {"humaneval": {**found, "correct": sum(right), "problems": 10, "solved": right}}, "task"
        )
        record = Record(
            "frontier", QualityTrial(plan, Inputs(), sizes), found.metrics | bytes_, found.samples
        )
        write_record(workdir, record)
    names = tuple(r.name for r in read_records(workdir).found)
    write_study(workdir, replace(read_study(workdir, "frontier"), trials=names))
    frontier = load(workdir)
    assert len(frontier.scored) == 5 and len(frontier.plans) == 6
    rows = {line.split(" | ")[0].strip("| "): line for line in problems(frontier).splitlines()}
    gained, lost = 7, 2  # problems that one of both alone solves
    as_uneven = [k for k in range(10) if math.comb(9, k) <= math.comb(9, gained)]
    p = sum(math.comb(9, k) for k in as_uneven) / 2**9
    assert f"| IQ2_S, ggml: {gained} to {lost}, p {p:.2f} |" in rows["Q2_K, gptq"]
    assert "| +0.100 [-0.126, +0.326] |" in rows["Q2_K, gptq"]
    assert "IQ2_S, ggml:" not in rows["Q3_K, ggml"] and rows["native"].endswith("| – | – |")
    assert "| 0.900 [0.596, 0.982] |" in rows["native"]


def test_document(workdir):
    text = write_report(workdir).read_text(encoding="utf-8")
    assert "1 of 17 trials have no usable record" in text
    assert (workdir / "figures/frontier.png").stat().st_size > 10_000
    row = next(line for line in text.splitlines() if line.startswith("| 60 % | sensitivity |"))
    cells = [part.strip() for part in row.strip("|").split("|")]
    assert cells[4] == "less" and cells[6] == "less" and "0.60×" in cells
    assert "nan" not in text.lower().split()
    assert write_report(workdir).read_bytes() == text.encode()
