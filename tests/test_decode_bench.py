"""A decode setting beside native experts: its figures, and the script that measures many."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from hobbit_jax.engine_flags import EngineOptions
from hobbit_jax.evals.engine_program import Decoded, decode, token_rows
from hobbit_jax.evals.measure import Measurement, Turn
from hobbit_jax.record import read_records

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_decode.py"


def test_what_is_lost_and_gained_by_hand():
    """Rows of one token over two: a speedup is of the same row, a KL of the same token."""

    def made(seconds, *probabilities):
        turns = tuple(Turn(1.0, (s,), (s,), (0, 0)) for s in seconds)
        logits = [np.log(np.array([[p, 1 - p]], np.float32)) for p in probabilities]
        return Decoded(Measurement(1, turns), logits, {})

    found = made((1.0, 4.0), 0.5, 0.25).beside(made((2.0, 2.0), 0.5, 0.75))
    assert (found["speedup"]["low"], found["speedup"]["high"]) == (0.5, 2.0)
    kl = 0.75 * np.log(3) - 0.25 * np.log(3)
    assert found["kl_mean_nats"].value == pytest.approx(kl / 2, rel=1e-5)
    assert found["top1_agreement"].value == 0.5


def test_settings_of_an_engine(two_banks_path, tmp_path, monkeypatch):
    """Native decode is its own reference at any budget; a uniform quant moves less and differs."""
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path))
    every = EngineOptions(str(two_banks_path), "xla")
    model = every.load_model()
    ids_RS = token_rows(model, 3, 12, made_up=True)
    found = {}
    for name, options in {
        "all": {}, "native": {"budget_mib": 1.0}, "low": {"budget_mib": 1.0, "low_format": "Q2_K"}
    }.items():  # fmt: skip
        setting = EngineOptions(every.model, "xla", **options)
        found[name] = decode(partial(setting.make_engine, model), ids_RS, 4, perf_counter)
        figures = found[name].figures
        assert figures["decode_tokens"] == 2 * 8 and figures["slots_total"] > 0
        assert figures["own_memory_peak_bytes"] > figures["pool_device_bytes"]
    same, low = (found[name].beside(found["native"]) for name in ("all", "low"))
    assert same["kl_mean_nats"].high == 0 and same["top1_agreement"].value == 1
    assert low["kl_mean_nats"].value > 0
    all_moved, moved, low_moved = (f.figures["bytes_moved_per_token"] for f in found.values())
    assert all_moved < low_moved < moved


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model=none.gguf", "none.gguf cannot be read"),
        ("--preset=tiny --model=m.gguf", "want one of --model and --preset"),
        ("--settings=fetch,fetch_low:Q9_K", "got 'fetch_low:Q9_K'; want MISS_MODE[:FORMAT"),
        ("--settings=fetch_low:Q2_K:2", "low_share is '2'; want adaptive or 0 to 1"),
        ("--budgets_mib=1,nan", "nan is not a number from 0 to"),
        ("--prefetch=oracle", "want a predictor of layer_ahead"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, flags, message):
    done = run_script("--workdir", tmp_path, *flags.split())
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error:") and message in done.stderr


@pytest.mark.slow
def test_the_whole_in_small(tmp_path):
    """A budget of a quarter of the experts; what does not fit is named."""
    arguments = (
        "--preset", "tiny", "--workdir", tmp_path, "--budgets_mib", "8", "--prompt_tokens", 5,
        "--tokens", 8, "--repeats", 2,
    )  # fmt: skip
    done = run_script(*arguments, "--settings", "fetch:Q2_K,fetch_low:Q2_K:0.8,floor:Q2_K")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("not measured: "))
    assert "floor:Q2_K at 8.0 MiB: " in line and "needs at least" in line
    model = (tmp_path / "tiny.gguf").stat().st_mtime_ns
    done = run_script(*arguments, "--settings", "fetch", "--prefetch", "layer_ahead:2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny.gguf").stat().st_mtime_ns == model  # the second run finds it
    found = {record.setting["setting"]: record for record in read_records(tmp_path).found}
    low, ahead = "fetch:Q2_K", "fetch"
    assert set(found) == {"native", low, "fetch_low:Q2_K:0.8", ahead}
    assert found[ahead].setting["prefetch"] == "layer_ahead:2"
    assert all(f"| {name} |" in done.stdout for name in found)
    moved = {name: record.metrics["bytes_moved_per_token"] for name, record in found.items()}
    assert 0 < moved[low] < 0.7 * moved["native"] <= moved[ahead]
    assert found["native"].metrics["kl_mean_nats"] == found[ahead].metrics["kl_mean_nats"] == 0
    assert found[ahead].metrics["bytes_ahead_per_token"] > 0
