"""Comparisons with other programs: the figures by hand, the child processes, the section.

The other programs here are scripted (`scripted_side.py`); the real ones are in
`test_baselines_oracles.py`.
"""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from hobbit_jax.baselines.child import SideSpec
from hobbit_jax.baselines.comparison import (
    BASELINES,
    STUDY,
    Request,
    agreement,
    baseline_factory,
    compare,
    compare_model,
)
from hobbit_jax.engine_flags import EngineOptions
from hobbit_jax.evals.process_memory import read_resident
from hobbit_jax.record import read_records, write_record
from hobbit_jax.report.baseline_tables import section

MIB = 2**20


def logits(*probabilities):
    """[T, V] with these probabilities; an offset per row must not matter."""
    rows_TV = np.log(np.asarray(probabilities))
    return (rows_TV + np.arange(len(rows_TV))[:, None]).astype(np.float32)


def test_agreement_by_hand():
    baseline_TV = logits((0.5, 0.25, 0.25), (0.5, 0.25, 0.25))
    # KL of the first token: .5 ln 2 + .25 ln ½ = ¼ ln 2; the second is the same distribution.
    ours_TV = logits((0.25, 0.5, 0.25), (0.5, 0.25, 0.25))
    found = agreement([(ours_TV, baseline_TV, np.array([1, 0]))] * 3).metrics
    assert (found["evaluation_tokens"], found["windows"]) == (6, 3)
    assert found["kl_mean_nats"] == pytest.approx(math.log(2) / 8, rel=1e-6)
    # The quantile between the two values that there are: 99 % of six lies beyond the fifth.
    assert found["kl_p99_nats"] == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert found["top1_agreement"] == 0.5
    # Probabilities of the targets: ours ½ and ½, the baseline's ¼ and ½.
    assert found["perplexity"] == pytest.approx(2.0, rel=1e-6)
    assert found["perplexity_baseline"] == pytest.approx(math.sqrt(8), rel=1e-6)
    assert found["perplexity_difference"] == pytest.approx(2 - math.sqrt(8), rel=1e-6)
    # Two of six logits differ, by ln 2.
    assert found["logit_max_difference"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["logit_rms_difference"] == pytest.approx(math.log(2) / math.sqrt(3), rel=1e-6)
    assert found["logit_std"] == pytest.approx(float(baseline_TV.std()), rel=1e-5)
    # Equal windows leave nothing to resample.
    assert found["kl_mean_nats_low"] == pytest.approx(found["kl_mean_nats_high"])


def test_kl_is_from_the_baseline():
    """Of (0.9, 0.1) against (0.5, 0.5): .9 ln 1.8 + .1 ln .2, and not the reverse."""
    found = agreement([(logits((0.5, 0.5)), logits((0.9, 0.1)), np.array([0]))])
    wanted = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert found.metrics["kl_mean_nats"] == pytest.approx(wanted, rel=1e-6)


def test_a_difference_is_taken_in_pairs():
    """Windows differ a hundred times more than the two programs do."""
    shift_V = np.array([0.01, 0.0], np.float32)
    bases = [
        logits((p, 1 - p), (p, 1 - p)) for p in np.random.default_rng(0).uniform(0.05, 0.95, 24)
    ]
    found = agreement((base + shift_V, base, np.array([0, 0])) for base in bases).metrics
    alone = found["perplexity_high"] - found["perplexity_low"]
    paired = found["perplexity_difference_high"] - found["perplexity_difference_low"]
    assert paired < alone / 20
    assert found["perplexity_difference_high"] < 0  # we give every target more


@pytest.mark.parametrize(
    ("ours_TV", "targets", "message"),
    [
        (np.zeros((2, 4)), 2, r"got logits \(1, 2, 4\) and \(1, 2, 3\) for tokens \(1, 2\)"),
        (np.zeros((2, 3)), 3, r"for tokens \(1, 3\)"),
        (np.full((2, 3), np.nan), 2, "^logits are not all finite"),
    ],
)
def test_refused_logits(ours_TV, targets, message):
    with pytest.raises(ValueError, match=message):
        agreement([(ours_TV, np.zeros((2, 3)), np.zeros(targets, int))])


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Returns a function that makes the spec of a scripted side; windows of 3 tokens, V = 5."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    rng = np.random.default_rng(0)

    def make(name="side", noise=0.0, **options):
        path = tmp_path / f"{name}.npy"
        base_WTV = np.random.default_rng(1).standard_normal((4, 3, 5))
        np.save(path, (base_WTV + noise * rng.standard_normal((4, 3, 5))).astype(np.float32))
        return SideSpec("scripted_side:Scripted", {"logits": str(path), **options}, 1)

    return make


WINDOWS_WS = np.array([[w, 1, 2, 3] for w in range(4)], np.int32)
ROWS_RS = np.full((4, 12), 1, np.int32)


def run(ours, baseline):
    return compare(ours, baseline, WINDOWS_WS, ROWS_RS, prompt_tokens=2)[0]


def test_both_in_turns(scripted, tmp_path):
    """Everything that a record says of two programs whose logits, times and memory are known."""
    mapped = tmp_path / "weights"
    mapped.write_bytes(bytes(64 * MIB))
    ours = scripted("ours", noise=0.1, step_s=0.04, mapped=str(mapped), warm_up_s=1.5)
    baseline = scripted("baseline", step_s=0.002, hold_bytes=96 * MIB)
    found = run(ours, baseline)
    metrics, notes = found.metrics, found.notes

    assert notes["ours_program"] == "scripted" and notes["ours_policy"] == "active"
    assert metrics["ours_threads"] == metrics["baseline_threads"] == 1
    both = [np.load(spec.options["logits"]) for spec in (ours, baseline)]
    wanted = agreement(zip(*both, WINDOWS_WS[:, 1:], strict=True)).metrics
    assert metrics["kl_mean_nats"] == wanted["kl_mean_nats"] > 0
    assert metrics["perplexity_difference_low"] == wanted["perplexity_difference_low"]
    assert (metrics["evaluation_tokens"], metrics["windows"]) == (12, 4)

    # 40 against 2 ms a step. On a busy machine a sleep is late, never early.
    assert metrics["decode_tokens_per_s_ours_high"] <= 25
    # The first turn is slow, says another token, and does not count.
    assert metrics["first_token_s_ours_low"] >= 0.08
    assert metrics["first_token_s_ours_high"] < 1.5
    assert 0.01 < metrics["decode_tokens_per_s_ratio"] < 0.8
    assert metrics["prefill_tokens_per_s_baseline_high"] <= 500
    assert metrics["same_greedy_token"] == 1.0
    assert metrics["ours_decode_hit_rate"] is None  # it counts nothing

    for part, heavy, light, size in (
        ("anonymous", "baseline", "ours", 96 * MIB),
        ("file", "ours", "baseline", 64 * MIB),
    ):
        more, less = (
            metrics[f"{side}_memory_peak_{part}"] - metrics[f"{side}_memory_before_model_{part}"]
            for side in (heavy, light)
        )
        assert size * 0.98 < more < size * 1.2 and less < size * 0.2
    total = metrics["baseline_memory_peak_total"]
    assert total >= metrics["baseline_memory_peak_anonymous"]


def test_memory_is_told_apart(tmp_path):
    before = read_resident(os.getpid())
    held = np.ones(64 * MIB, np.uint8)
    after = read_resident(os.getpid())
    assert before and after and held[0]
    assert 60 * MIB < after.anonymous - before.anonymous < 80 * MIB
    assert abs(after.file - before.file) < 8 * MIB
    assert after.total >= after.anonymous + after.file
    assert read_resident(2**22 + 1) is None  # beyond the largest process id


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def started(monkeypatch):
    """Process ids of the children, as they start."""
    pids, popen = [], subprocess.Popen

    def record(*arguments, **options):
        process = popen(*arguments, **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr("hobbit_jax.baselines.child.subprocess.Popen", record)
    return pids


def test_a_program_that_refuses(scripted, started):
    """The child's own error, after its name; the other child is gone too."""
    with pytest.raises(ValueError, match=r"^baseline: no such model$"):
        run(scripted(), scripted(fails="load"))
    assert len(started) == 2 and not any(alive(pid) for pid in started)
    with pytest.raises(ValueError, match=r"^ours: threads is 99; want 1 to the"):
        run(SideSpec("scripted_side:Scripted", scripted().options, 99), scripted())


def test_a_program_that_is_killed(scripted, started):
    with pytest.raises(
        ChildProcessError, match=r"^baseline ended by signal 9: a library that talks"
    ):
        run(scripted(), scripted(fails="decode"))
    assert len(started) == 2 and not any(alive(pid) for pid in started)
    with pytest.raises(
        ChildProcessError, match=r"^baseline: 3 \(KeyError; .*self\.logits_WTV\[3\]"
    ):
        run(scripted(), scripted(fails="score"))


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_missing_library_says_how_to_install_it(monkeypatch, baseline):
    """By an extra that pyproject.toml has, of a name that every pip finds."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"pip install -c .* -e '\.\[.*\]'$") as refused:
        baseline_factory(baseline)
    extra = str(refused.value).rpartition("[")[2].removesuffix("]'")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"] and "_" not in extra


def test_rows_longer_than_the_context(monkeypatch, two_banks_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    request = Request(EngineOptions(str(two_banks_path), threads=1), "torch", 2, 32, 2, 40, 30)
    with pytest.raises(ValueError, match="rows of 70 tokens; want at most the model's context"):
        compare_model(request)


@pytest.mark.slow
def test_our_side(monkeypatch, tmp_path, two_banks_path):
    """The engine in its child, under a budget, beside a baseline that knows nothing."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setitem(BASELINES, "torch", ("scripted_side:Uniform", ()))
    text = tmp_path / "letters.txt"
    text.write_text("the quick brown fox " * 20)
    budget_bytes = 2**20
    options = EngineOptions(str(two_banks_path), budget_mib=1.0, threads=1)
    record = compare_model(Request(options, "torch", 2, 20, 2, 12, 4, str(text), "float32"))
    metrics, notes = record.metrics, record.notes
    assert metrics["perplexity_baseline"] == pytest.approx(258, rel=1e-6)
    assert metrics["logit_std"] == 0 < metrics["logit_rms_difference"]
    assert (metrics["baseline_context"], notes["baseline_mode"]) == (20, "float32")
    assert 0 < metrics["ours_pool_bytes"] <= metrics["ours_budget_bytes"] == budget_bytes
    assert 0 < metrics["ours_decode_hit_rate"] < 1 and metrics["ours_threads"] == 1
    assert record.asked.setting["model"] == "tiny.gguf" and notes["text"] == "letters.txt"
    assert record.asked.setting["budget_bytes"] == budget_bytes and record.device
    kept = {key: word for key, word in notes.items() if key != "baseline_model"}  # its own doing
    own = dataclasses.replace(record, notes=kept)
    path = write_record(tmp_path / "study", own)
    assert str(tmp_path) not in path.read_text()
    assert read_records(tmp_path / "study").found == (own,)
    text = section([record])
    assert "| uniform float32 |" in text and f"| {metrics['kl_mean_nats']:.2g} " in text


def test_recorded_rows():
    """Those that ship can be read, and name no path of the machine they were made on."""
    records = read_records(REPOSITORY / "docs").of(STUDY)
    assert {r.notes["baseline_program"] for r in records} == {"PyTorch", "llama.cpp"}
    text = (REPOSITORY / "docs" / "records" / f"{STUDY}.jsonl").read_text()
    assert sys.prefix not in text and '"/' not in text
