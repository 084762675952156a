"""The quality frontier: a cell on a real engine, and what the report makes of rows, by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from launch_harness import run_sweep
from scipy import stats

from hobbit_jax.cells.frontier import FrontierCell
from hobbit_jax.cells.workbench import EvalSizes, Inputs
from hobbit_jax.experts.store import NATIVE
from hobbit_jax.report import write_report
from hobbit_jax.report.frontier_results import is_frontier, load_frontier, tier_overlap

TEXT = "Whenever it is a damp, drizzly November in my soul; whenever I find myself. "
SIZES = EvalSizes(windows=3, context=24, calibration_windows=3)


def cell(signal, formats=(), method="rtn", fraction=None, shares=None, **more) -> FrontierCell:
    fields = {"through": (), "seed": 0, "calibration_text": "", "inputs": Inputs("", "", "")}
    return FrontierCell(
        signal, tuple(formats), method, fraction, shares, **{**fields, "sizes": SIZES, **more}
    )


@pytest.mark.slow
def test_cells_on_an_engine(two_banks_path, tmp_path):
    """Bytes within the limit, selections counted, tiers' errors; each cell a row."""
    for name in ("calibration", "evaluation"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: {TEXT}" * 12)
    inputs = Inputs(
        str(two_banks_path), str(tmp_path / "calibration.txt"), str(tmp_path / "evaluation.txt")
    )
    formats = ("Q3_K", "Q2_K")
    cells = [
        replace(made, inputs=inputs)
        for made in (
            cell("native"),
            cell("uniform", ("Q2_K",), "gptq"),
            cell("sensitivity", formats, "rtn", 0.7),
            cell("random", formats, "rtn", 0.7),
            cell("cumulative_weight", ("Q2_K",), "rtn", shares=(0.5, 0.3, 0.2)),
        )
    ]
    ran, _, failed = run_sweep(cells, {"title": "t"}, tmp_path / "w")
    assert (ran, failed) == (5, 0)
    rows = [json.loads((tmp_path / f"w/rows/{c.name}.json").read_text()) for c in cells]
    native, uniform, sensitive, random, hobbit = rows
    assert native["quality"]["kl_mean"]["value"] < 1e-6
    selections = 3 * 24 * 3 * 2  # windows · tokens · layers · experts per token
    assert all(row["uses"]["selections"] == selections for row in rows)
    assert uniform["uses"]["tier_shares"] == [0.0, 1.0]
    errors = uniform["tiers"][0]
    assert 0.02 < errors["output_error"] < errors["weight_error"] < 0.6
    for row in (sensitive, random):
        assert row["store"]["plan_bytes"] <= 0.7 * row["store"]["native_bytes"]
        assert row["store"]["plan_bytes"] > 0.66 * row["store"]["native_bytes"]
    assert sensitive["tier_LE"] != random["tier_LE"]
    assert hobbit["uses"]["skipped_share"] == pytest.approx(0.2, abs=0.08)
    assert hobbit["uses"]["tier_shares"][NATIVE] == pytest.approx(0.5, abs=0.08)
    assert hobbit["quality"]["kl_mean"]["value"] > 0
    assert len(hobbit["quality"]["kl_by_window"]) == 3
    assert run_sweep(cells, {"title": "t"}, tmp_path / "w") == (0, 5, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loudest",), "signal is 'loudest'; want one of native, "),
        (("uniform", ("Q2_K",), "best"), "method is 'best'; want one of rtn, "),
        (("frequency", ("Q2_K",)), "frequency with bytes_fraction None"),
        (("uniform", ("Q2_K",), "rtn", 0.5), "uniform with bytes_fraction 0.5"),
        (("router_weight", ("Q2_K",)), "router_weight with shares None"),
        (("native", ("Q2_K",)), r"native with formats \('Q2_K',\)"),
        (("router_weight", ("Q2_K",), "rtn", None, (1.0,)), r"1 formats with shares \(1.0,\)"),
    ],
)
def test_refuses_a_cell_without_meaning(arguments, message):
    with pytest.raises(ValueError, match=message):
        cell(*arguments)


# ------------------------------------------------------------------- the report, on made-up rows

WINDOWS, NATIVE_BYTES = 40, 1000
NOISE_W = np.random.default_rng(0).gamma(2.0, 0.5, WINDOWS)  # what windows have in common


def make_row(made: FrontierCell, level: float, plan_bytes: int, tiers=(), tier_LE=None) -> dict:
    kl_W = level * NOISE_W * np.random.default_rng(made.seed).uniform(0.98, 1.02, WINDOWS)
    interval = {"value": float(kl_W.mean()), "low": 0.0, "high": 1.0}
    return {
        "cell": made.name,
        "status": "ok",
        "config": json.loads(json.dumps(vars(made), default=vars)),
        "quality": {
            "tokens": WINDOWS * 512, "kl_mean": interval, "kl_by_window": kl_W.tolist(),
            "top1_agreement": interval, "perplexity": interval,
        },
        "tasks": None,
        "store": {"native_bytes": NATIVE_BYTES, "plan_bytes": plan_bytes},
        "uses": {"bytes_per_selection": plan_bytes / 10, "tier_shares": [1.0], "skipped_share": 0},
        "tiers": list(tiers),
        "tier_LE": [[0]] if tier_LE is None else tier_LE,
    }  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    """Sensitivity beats the control by 2 %, far within its interval but not within the pairs."""
    formats = ("Q3_K", "Q2_K")
    rows = [make_row(cell("native"), 0.0, NATIVE_BYTES)]
    for seed in (0, 1, 2):
        rows += [
            make_row(cell("uniform", ("Q3_K",), "gptq", seed=seed), 0.02, 700),
            make_row(cell("uniform", ("Q2_K",), "gptq", seed=seed), 0.06, 500),
            make_row(cell("uniform", ("Q2_K",), "ggml", seed=seed), 0.12, 500),
            make_row(
                cell("sensitivity", formats, "gptq", 0.6, seed=seed), 0.0392, 600,
                tier_LE=[[0, 0, 1, 2], [2, 2, 1, 0]],
            ),
            make_row(
                cell("random", formats, "gptq", 0.6, seed=seed), 0.04, 600,
                tier_LE=[[0, 1, 1, 2], [0, 2, 2, 0]],
            ),
        ]  # fmt: skip
    (tmp_path / "rows").mkdir()
    for row in rows:
        (tmp_path / "rows" / f"{row['cell']}.json").write_text(json.dumps(row))
    sweep = {"title": "T", "question": "Q?", "command": "python x", "config": {}, "rule": {}}
    sweep["cells"] = [row["cell"] for row in rows] + ["never-ran"]
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    return tmp_path


def test_pairs_tell_apart_what_intervals_do_not(workdir):
    frontier = load_frontier(workdir)
    of = {(m.plan.signal, m.plan.method, m.plan.formats[-1:]): m for m in frontier.measured}
    signal = of["sensitivity", "gptq", ("Q2_K",)]
    random = of["random", "gptq", ("Q2_K",)]
    assert signal.seeds == random.seeds == (0, 1, 2)
    assert signal.kl.low < random.kl.low < signal.kl.high  # they overlap
    difference = frontier.difference(signal, random)
    assert difference.value == pytest.approx(signal.kl.value - random.kl.value)
    assert difference.low < difference.value < difference.high < 0

    # Half way between Q2_K at 500 bytes and Q3_K at 700.
    line = frontier.line(random, "gptq")
    wanted_SW = (
        of["uniform", "gptq", ("Q2_K",)].kl_SW + of["uniform", "gptq", ("Q3_K",)].kl_SW
    ) / 2
    np.testing.assert_allclose(line.kl_SW, wanted_SW, rtol=1e-12)
    assert frontier.line(random, "rtn") is None
    assert frontier.missing == 1 and not frontier.failed


def test_overlap_is_spearmans(workdir):
    frontier = load_frontier(workdir)
    signal, random = (
        next(m for m in frontier.measured if m.plan.signal == name)
        for name in ("sensitivity", "random")
    )
    same, rank = tier_overlap(signal, random)
    assert same == 5 / 8
    left, right = (np.ravel(m.rows[0]["tier_LE"]) for m in (signal, random))
    assert rank == pytest.approx(stats.spearmanr(left, right).statistic)


def test_document(workdir):
    assert is_frontier(workdir)
    text = write_report(workdir).read_text(encoding="utf-8")
    assert "**Q2_K with calibration** (gptq) has ×0.50 the KL" in text
    assert "the best signal is sensitivity" in text and "less than the random control" in text
    assert "1 have no row" in text
    assert (workdir / "figures/frontier.png").stat().st_size > 10_000
    row = next(line for line in text.splitlines() if line.startswith("| 60 % | sensitivity |"))
    cells = [part.strip() for part in row.strip("|").split("|")]
    assert cells[4] == "less" and cells[6] == "less" and cells[8] == "×0.60"
    assert "nan" not in text.lower().split()
    again = write_report(workdir).read_bytes()
    assert again == text.encode()


def test_a_row_of_another_kind_is_refused(workdir):
    path = next((workdir / "rows").glob("random-*.json"))
    row = json.loads(path.read_text())
    del row["quality"]["kl_by_window"]
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="no row of a quality frontier: 'kl_by_window'"):
        load_frontier(workdir)
