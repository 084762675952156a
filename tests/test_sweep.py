"""Sweeps: every cell gets one true row, whatever fails or is killed on the way."""

import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launch_harness import record_files, run_sweep

from hobbit_jax import reference
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.importance.allocation import allocate
from hobbit_jax.importance.scores import RoutingProfile
from hobbit_jax.record import (
    CacheTrial,
    EvalSizes,
    Inputs,
    MissModeTrial,
    Mixed,
    Native,
    QualityTrial,
    Record,
    Uniform,
    read_records,
    read_study,
    record_path,
)
from hobbit_jax.statistics import bootstrap, share
from hobbit_jax.sweep.trial import Trial, spread

REPOSITORY = Path(__file__).resolve().parent.parent
LOW = 1
SIZES = EvalSizes(
    windows=2,
    context=64,
    calibration_windows=2,
    task_problems=2,
    decode_prompt_tokens=4,
    decode_tokens=4,
    decode_repeats=1,
    decoded_windows=1,
)


def cell(plan, budget_mib: float = 2.0) -> Trial:
    return Trial(CacheTrial(plan, budget_mib, Inputs(), SIZES))


def changed(made: Trial, **fields) -> Trial:
    return Trial(replace(made.asked, **fields))


NATIVE, UNIFORM = cell(Native()), cell(Uniform("Q2_K"))
FREQUENCY, ROUTER, RANDOM = (
    cell(Mixed(score, 0.5, "Q2_K")) for score in ("frequency", "router_weight", "random")
)
# All experts at Q2_K take 3.94 MiB, so that none of them has a native slot.
FLOOR = cell(MissModeTrial("floor", 0.0, "Q2_K"), 3.95)
CELLS = [NATIVE, UNIFORM, FREQUENCY, ROUTER, RANDOM, FLOOR]
DESCRIPTION = {"title": "t", "question": "?", "command": "c", "config": {}, "rule": {}}


def read(workdir: Path) -> dict[str, Record]:
    found = read_records(workdir)
    assert not found.unreadable
    return {record.name: record for record in found.found}


def record_bytes(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in record_files(workdir)}


def script(name: str, *args: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "scripts" / name), *args]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """The workdir of a finished sweep over `CELLS`."""
    workdir = tmp_path_factory.mktemp("sweep")
    assert run_sweep(CELLS, DESCRIPTION, workdir) == (6, 0, 0)
    return workdir


def test_trials_of_one_quality_stand_apart():
    """A plan has one quality under every pool, and a miss mode has another under each."""
    plans = Native(), Uniform("Q2_K")
    fixed = [cell(plan, budget) for plan in plans for budget in (1.0, 2.0, 5.0)]
    by_decoding = [cell(MissModeTrial("hobbit", 0.5, "Q2_K"), budget) for budget in (1.0, 2.0)]
    ordered = spread([*fixed, *by_decoding])
    assert ordered == [fixed[0], fixed[3], *by_decoding, fixed[1], fixed[4], fixed[2], fixed[5]]


@pytest.mark.slow
def test_records(swept):
    records = read(swept)
    assert set(records) == {c.name for c in CELLS}
    assert list(read_study(swept, "reference").trials) == [c.name for c in CELLS]
    for record in records.values():
        assert (record.status, record.error) == ("ok", None)
        m = record.metrics
        assert m["pool_device_bytes"] <= m["pool_budget_bytes"]
        slots = [v for n, v in m.items() if n.startswith("slots_") and n != "slots_total"]
        assert 0 < m["resident_experts"] <= m["slots_total"] == sum(slots)
        assert m["decode_tokens"] == SIZES.decode_tokens * SIZES.decode_repeats
        if not isinstance(record.asked.plan, MissModeTrial):
            assert m["pool_budget_bytes"] == 2 * 2**20
            assert 0 < m["bytes_moved_per_token"] < m["bytes_read_per_token"]
            assert 0 < m["hit_rate"] < 1
            assert m["evaluation_tokens"] == SIZES.windows * SIZES.context
        for name in m:
            if f"{name}_low" in m:
                assert m[f"{name}_low"] <= m[name] <= m[f"{name}_high"], name
        assert m["kl_mean_nats"] <= m["kl_p99_nats"] <= m["kl_p999_nats"]
        is_control = getattr(record.asked.plan, "score", "") == "random"  # compared by KL alone
        for task in ("task_arithmetic", "task_functions"):
            solved = record.samples.get(f"{task}_solved")
            assert m.get(f"{task}_correct") == (None if is_control else sum(solved))

    found = [records[c.name] for c in CELLS]
    native, uniform, frequency, router, random, floor = (record.metrics for record in found)
    assert [native[f"kl_mean_nats{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert native["top1_agreement"] == 1
    # 4 layers of 2 experts per token, over the calibration windows.
    assert np.sum(found[0].samples["selections_LE"]) == 2 * 64 * 4 * 2
    for mix in (frequency, router, random):
        assert 0 < mix["kl_mean_nats"] < uniform["kl_mean_nats"]
        assert 0 < mix["demoted_share"] < 1

    assert native["demoted_share"] == 0
    assert uniform["demoted_share"] == 1
    # Uniform experts are all of one size, so that misses and bytes are the same count.
    assert uniform["bytes_read_per_token"] == 4 * 2 * uniform["expert_bytes_mean"]
    missed = uniform["bytes_read_per_token"] * (1 - uniform["hit_rate"])
    assert uniform["bytes_moved_per_token"] == pytest.approx(missed, rel=1e-12)

    high, low = native["stored_bytes"], uniform["stored_bytes"]
    assert high == native["native_bytes"] > low
    assert low < frequency["stored_bytes"] < high
    assert router["stored_bytes"] == high + low  # either copy of any expert
    assert floor["stored_bytes"] == high + low

    # Without a native slot floor is the uniform quant: decoded token by token, it loses as much.
    assert (floor["host_round_trips_per_token"], floor["bytes_moved_per_token"]) == (0, 0)
    assert floor["demoted_share"] == 1
    assert floor["evaluation_tokens"] == SIZES.context
    decoded, scored = (found[n].samples["kl_nats_W"][0] for n in (5, 1))
    assert decoded == pytest.approx(scored, rel=1e-3)
    for task in ("task_arithmetic_solved", "task_functions_solved"):
        assert found[5].samples[task] == found[1].samples[task]


@pytest.mark.slow
def test_benchmarks_are_scores_of_a_cell(tmp_path):
    """lm-eval's miniature arithmetic has the problems of our own, so it solves as many; and a trial
    of quality without windows solves the same ones.
    """
    sizes = replace(
        SIZES, windows=1, task_problems=5, benchmarks=("mini_arithmetic",), benchmark_problems=5
    )
    made = changed(UNIFORM, sizes=sizes)
    alone = Trial(QualityTrial(UNIFORM.asked.plan, Inputs(), replace(sizes, windows=0)))
    assert run_sweep([made, alone], DESCRIPTION, tmp_path) == (2, 0, 0)
    records = read(tmp_path)
    metrics, solved = records[made.name].metrics, "task_mini_arithmetic_solved"
    assert "kl_nats_W" not in records[alone.name].samples
    assert len(records[alone.name].samples[solved]) == 5
    assert records[alone.name].samples[solved] == records[made.name].samples[solved]
    assert metrics["task_functions_problems"] == 5
    for end in ("", "_low", "_high", "_problems", "_correct"):
        assert metrics[f"task_mini_arithmetic{end}"] == metrics[f"task_arithmetic{end}"]
    assert list((tmp_path / "responses").iterdir())


@pytest.mark.slow
def test_nothing_runs_twice(swept):
    before = record_bytes(swept)
    assert run_sweep(CELLS, DESCRIPTION, swept) == (0, 6, 0)
    assert record_bytes(swept) == before


@pytest.mark.slow
def test_only_what_is_missing_runs(swept):
    """A cell that cannot run, a torn record and garbage; the finished ones stay as they are."""
    before, kept = record_bytes(swept), read(swept)
    torn = [record_path(swept, c.name) for c in (UNIFORM, FREQUENCY)]
    torn[0].write_bytes(torn[0].read_bytes()[:-100])
    torn[1].write_bytes(b"\xff\x00" * 50)
    cramped = changed(NATIVE, budget_mib=0.1)
    assert run_sweep([cramped, *CELLS], DESCRIPTION, swept) == (3, 4, 1)

    after, records = record_bytes(swept), read(swept)
    failed = records.pop(cramped.name)
    assert failed.status == "failed" and not failed.metrics
    assert failed.error.startswith("ValueError: ") and "budget" in failed.error
    assert "\n" not in failed.error
    for c in (UNIFORM, FREQUENCY):
        for name, value in kept[c.name].metrics.items():
            if not re.search(r"_s(_|$)", name):  # a time
                assert records[c.name].metrics[name] == value, name
    for c in (NATIVE, ROUTER, RANDOM):
        assert after[f"{c.name}.json"] == before[f"{c.name}.json"]


def test_cells_have_names_of_their_own():
    """Whatever changes a measurement changes the name, or a stale record would stand for it."""
    others = [
        changed(FREQUENCY, seed=1),
        changed(FREQUENCY, protected_fraction=0.5),
        changed(FREQUENCY, policy="lru"),
        cell(Mixed("frequency", 0.5, "Q2_K", "gptq")),
        cell(MissModeTrial("fetch_low", 0.0, "Q2_K"), 3.95),
        cell(MissModeTrial("floor", 0.5, "Q2_K"), 3.95),
        cell(MissModeTrial("floor", "adaptive", "Q2_K"), 3.95),
        changed(FREQUENCY, sizes=replace(SIZES, context=65)),
        changed(FREQUENCY, inputs=Inputs("M.gguf")),
        changed(FREQUENCY, budget_mib=2.0000001),
    ]
    assert len({c.name for c in [*CELLS, *others]}) == len(CELLS) + len(others)


SMALL = (
    f"--config={REPOSITORY}/configs/reference.py:demo",
    "--config.eval.windows=2",
    "--config.eval.context=64",
    "--config.eval.calibration_windows=2",
    "--config.eval.task_problems=0",
    "--config.eval.decode_prompt_tokens=4",
    "--config.eval.decode_tokens=4",
    "--config.eval.decode_repeats=1",
    "--config.cache.budget_mib=2",
    "--config.precision.scores=frequency",
)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path):
    command = script("sweep.py", *SMALL, f"--workdir={tmp_path}")
    # The second process need not compile again.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    env = {**os.environ, **cache}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            deadline = time.monotonic() + 240
            while not record_files(tmp_path):
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, "no record"
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    finished = {path: path.read_bytes() for path in record_files(tmp_path)}
    assert all(r.metrics["decode_tokens"] == 4 for r in read_records(tmp_path).found)
    assert 1 <= len(finished) < 4

    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{4 - len(finished)} trials done, 0 failed, {len(finished)} were" in done.stdout
    assert sorted(path.name.split("-")[0] for path in record_files(tmp_path)) == [
        "mixed", "native", "uniform", "uniform",
    ]  # fmt: skip
    assert {path: path.read_bytes() for path in finished} == finished

    done = subprocess.run(
        script("report.py", f"--workdir={tmp_path}"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    decision = (tmp_path / "decision.md").read_text(encoding="utf-8")
    assert "frequency" in decision and "nan" not in decision.lower().split()


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with a cut file for a model, and a plain file for a folder."""
    whole = reference.model_path().read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.model={0}/cut.gguf"], "cut.gguf: "),
        (["--workdir={0}/file/w"], "--workdir: {0}/file/w cannot be written (Not a directory)"),
        (["--config.cache.budgetmib=8"], "budgetmib"),
        (["--config.precision.scores=loudest"], "importance score is 'loudest'; want one of "),
        (["--config.precision.method=awq"], "method is 'awq'; want one of ggml, gptq"),
    ],
)
def test_bad_input_is_one_line(broken, args, message):
    args = [f"--workdir={broken}/w", *(arg.format(broken) for arg in args)]
    done = subprocess.run(
        script("sweep.py", *SMALL, *args), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message.format(broken) in errors[0]
    assert done.stderr.endswith(f"{errors[0]}\n") and len(errors[0]) < 400
    assert not record_files(broken / "w")


def made_profile(selections_LE) -> RoutingProfile:
    selections_LE = np.asarray(selections_LE)
    weights_TK = np.random.default_rng(3).random((int(selections_LE.sum()) // 2, 2), np.float32)
    weights_TK = -np.sort(-weights_TK)
    return RoutingProfile(selections_LE, -selections_LE.astype(np.float64), weights_TK)


@pytest.mark.parametrize("name", ["frequency", "accumulated_weight", "random"])
def test_static_signals_count_pairs(name):
    profile = made_profile(np.random.default_rng(0).permutation(48).reshape(3, 16))
    scores_LE = {"frequency": profile.selections_LE, "accumulated_weight": profile.weight_LE}
    below = np.zeros((3, 16), bool)
    for fraction in (0, 0.25, 0.3, 0.5, 0.9, 1):
        low = allocate(name, fraction, LOW, profile, 0).precision_LE == LOW
        assert low.sum() == round(fraction * 48) and (low | ~below).all()  # nested
        if name in scores_LE and low.any() and not low.all():
            assert scores_LE[name][low].max() < scores_LE[name][~low].min()
        below = low


def test_allocation_at_its_edges():
    profile = made_profile([[5, 5, 5, 5], [5, 5, 5, 5]])
    tied = allocate("frequency", 0.625, LOW, profile, 0)
    assert tied.precision_LE.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert np.array_equal(
        allocate("frequency", 0.625, LOW, profile, 9).precision_LE, tied.precision_LE
    )
    drawn = [
        allocate("random", 0.5, LOW, profile, seed).precision_LE.tobytes() for seed in range(8)
    ]
    assert len(set(drawn)) > 4
    assert drawn[3] == allocate("random", 0.5, LOW, profile, 3).precision_LE.tobytes()
    for signal_name, fraction in (("loudest", 0.5), ("random", 1.5), ("router_weight", -0.1)):
        with pytest.raises(ValueError, match=r"want (one of|0 to 1)"):
            allocate(signal_name, fraction, LOW, profile, 0)


def test_router_weight_counts_selections():
    profile = made_profile([[25, 15], [30, 30]])
    weights_TK = profile.weights_TK
    ids_TK = np.zeros((50, 2), np.int32)
    for fraction in (0, 0.25, 0.5, 0.99, 1):
        precisions = allocate("router_weight", fraction, LOW, profile, 0).assign(
            0, ids_TK, weights_TK
        )
        assert (precisions == LOW).sum() == round(fraction * 100)
        by_weight = precisions.reshape(-1)[np.argsort(weights_TK, axis=None)]
        assert (np.diff(by_weight) <= 0).all()  # the lightest go low
    # Lighter and heavier than any on the calibration text.
    nothing = allocate("router_weight", 0, LOW, profile, 0)
    assert not nothing.assign(0, ids_TK, weights_TK * 0).any()
    everything = allocate("router_weight", 1, LOW, profile, 0)
    assert (everything.assign(0, ids_TK, weights_TK + 10) == LOW).all()


def test_share():
    """Wilson (1927) by its published worked values."""
    for (correct, total), low, high in [
        ((0, 10), 0.0, 0.277533),
        ((10, 10), 0.722467, 1.0),
        ((5, 10), 0.236593, 0.763407),
        ((81, 263), 0.255289, 0.366205),  # Newcombe (1998), table I, method 3: .2553 to .3662
        ((15, 148), 0.062387, 0.160526),  # .0624 to .1605
    ]:
        got = share(correct, total)
        assert got.value == correct / total
        assert (got.low, got.high) == pytest.approx((low, high), abs=5e-5)
        assert 0 <= got.low <= got.value <= got.high <= 1
    with pytest.raises(ValueError, match="at least one"):
        share(0, 0)


def test_bootstrap():
    values = np.random.default_rng(1).standard_normal(1600)
    widths = []
    for n in (16, 100, 1600):
        interval = bootstrap(lambda drawn, n=n: values[:n][drawn].mean(), n)
        assert interval.value == values[:n].mean()
        assert interval.low < interval.value < interval.high
        widths.append(interval.high - interval.low)
        # The normal interval of a mean, by the law it must approach.
        assert widths[-1] == pytest.approx(3.92 * values[:n].std() / math.sqrt(n), rel=0.15)
    assert all(wide > narrow for wide, narrow in itertools.pairwise(widths))


class Bytes:
    """A tokenizer of one token per byte; every token stands for two."""

    eos_id = 201

    def __init__(self, add_bos: bool = False, bos_id: int = 200):
        self.add_bos, self.bos_id = add_bos, bos_id

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        begins = self.add_bos if add_bos is None else add_bos
        return [self.bos_id] * begins + list(text.encode())

    def byte_lengths(self) -> np.ndarray:
        return np.full(256, 2)


def test_cut_windows():
    texts = [bytes(range(60)).decode(), bytes(range(60, 105)).decode()]
    windows = cut_windows(Bytes(), texts, 5, 20)
    assert windows.ids_WS.reshape(-1).tolist() == list(range(105))  # all of it, nothing twice
    assert windows.target_bytes_WT.tolist() == [[2] * 20] * 5 and windows.targets == 100
    few = [cut_windows(Bytes(), texts, 2, 20, seed).ids_WS for seed in (0, 0, 1, 2, 3)]
    assert np.array_equal(few[0], few[1])
    assert len({ids_WS.tobytes() for ids_WS in few}) > 1
    with pytest.raises(ValueError, match=r"105 tokens, enough for 5 windows .* 6 were asked for"):
        cut_windows(Bytes(), texts, 6, 20)


def test_windows_begin_with_bos_where_texts_do():
    """As in llama.cpp's perplexity; nothing of the text is lost, and no BOS stands inside."""
    texts = [bytes(range(60)).decode(), bytes(range(60, 105)).decode()]
    windows = cut_windows(Bytes(add_bos=True), texts, 5, 20)
    assert windows.begin_with_bos and windows.first(2).begin_with_bos
    assert windows.ids_WS.shape == (5, 21) and windows.ids_WS.dtype == np.int32
    assert (windows.ids_WS[:, 0] == 200).all()
    assert windows.ids_WS[:, 1:].reshape(-1).tolist() == list(range(100))
    assert windows.target_bytes_WT.tolist() == [[2] * 20] * 5
    assert len(cut_windows(Bytes(add_bos=True), texts, 4, 20, seed=1).ids_WS) == 4
    with pytest.raises(ValueError, match=r"105 tokens, enough for 5 windows .* 6 were asked for"):
        cut_windows(Bytes(add_bos=True), texts, 6, 20)
    # One that parts documents, as in the reference model, stands where a document begins.
    parted = cut_windows(Bytes(add_bos=True, bos_id=201), texts, 5, 20)
    assert not parted.begin_with_bos
    assert parted.ids_WS.reshape(-1).tolist() == [201, *range(60), 201, *range(60, 103)]
    assert not cut_windows(Bytes(), texts, 5, 20).begin_with_bos
