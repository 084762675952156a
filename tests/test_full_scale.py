"""The record of a decode at full scale: what its watch sees, how it counts, the whole in small."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hobbit_jax.evals.full_scale import Run, Watch, decode_figures, table, token_rows
from hobbit_jax.evals.measure import Counts, Turn

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "scale.py"


def test_the_watch_sees_memory_that_is_gone_again_and_what_was_compiled():
    with Watch().running() as watch:
        with watch.stretch("before"):
            pass
        with watch.stretch("large") as large:
            array = np.ones(64 << 20, np.uint8)
            time.sleep(0.3)
            del array
        with watch.stretch("after"):
            jax.jit(lambda x: x * 3.25)(np.arange(7.0)).block_until_ready()
    before, after = watch.stretches["before"], watch.stretches["after"]
    assert large.peak_bytes - before.end_bytes > 60 << 20
    assert large.peak_bytes - large.end_bytes > 60 << 20
    assert after.peak_bytes < large.peak_bytes and large.seconds > 0.1
    assert after.compile_seconds > 0 == before.compile_seconds == large.compile_seconds


def made_turn(*tokens):
    """Of (seconds, CPU seconds, counts)."""
    seconds, cpu_s, counts = zip(*tokens, strict=True)
    return Turn(1.0, seconds, cpu_s, (0,) * (len(tokens) + 1), None, counts)


def made_counts(misses, bytes_moved, exits, demoted):
    return Counts(
        hits=8 - misses, misses=misses, bytes_moved=bytes_moved, host_round_trips=exits,
        selections=8, demoted=demoted,
    )  # fmt: skip


def test_figures_of_tokens():
    first = 100.0, 100.0, made_counts(8, 0, 0, 8)
    rest = [(1.0 + m, 0.5 + 0.25 * m, made_counts(m, m * 1_000_000, m, m)) for m in (0, 2, 4, 6)]
    figures = decode_figures(made_turn(first, *rest))
    assert figures["cpu_ms_without_miss"] == pytest.approx(500)
    assert figures["cpu_ms_per_miss"] == pytest.approx(250)
    assert figures["hit_rate"] == pytest.approx(20 / 32)
    assert figures["degraded_fraction"] == pytest.approx(12 / 32)
    rates = figures["tokens_per_s"]
    assert rates["median"] == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert (rates["low"], rates["high"]) == pytest.approx((1 / 7, 1.0))
    assert figures["mb_moved_per_token"]["median"] == 3
    constant = decode_figures(made_turn(first, rest[1], rest[1]))
    assert constant["cpu_ms_without_miss"] is None and constant["cpu_ms_per_miss"] is None


def made_record(setting: str, budget_bytes: int | None, moved: list[int]) -> dict:
    """A record as `measure` makes it, as far as the table reads it."""
    turn = made_turn(
        (9, 8, made_counts(2, 999, 1, 0)), *((1, 2, made_counts(2, b, 3, 4)) for b in moved)
    )
    run = Run(Path("m.gguf"), budget_bytes, 8, len(turn.tokens), setting=setting,
              low_format=None if setting == "native" else "Q2_K")  # fmt: skip
    return {
        "run": {**vars(run), "model": "m.gguf"},
        "slots": {"a": 3, "b": 4},
        "decode": decode_figures(turn),
        "tokens": token_rows(turn),
    }


def test_the_table_compares_what_decoded_the_same_tokens():
    records = [
        made_record("fetch_low", 2**30, [1_000_000, 3_000_000]),
        made_record("native", 2**30, [4_000_000, 4_000_000]),
        made_record("fetch_low", None, [0, 0]),  # nobody decoded natively with all resident
        made_record("fetch_low", 2**30, [1_000_000, 3_000_000, 5_000_000]),  # another workload
    ]
    native, low, more, full = [line.split(" | ") for line in table(records)[2:]]
    cpu = "2.00 (2.00 to 2.00)"
    assert native == ["| 1", "native", "7", "0.750", "2", "3.0", "4", "0.500", cpu, "×1.00 |"]
    assert low == ["| 1", "fetch_low Q2_K", "7", "0.750", "2", "3.0", "2", "0.500", cpu, "×0.50 |"]
    assert more[6] == "3" and more[-1] == full[-1] == "– |" and full[0] == "| all"


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_mistake_is_one_line(tmp_path):
    done = run_script("--workdir", tmp_path, "--model", tmp_path / "none.gguf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error:") and "none.gguf cannot be read" in done.stderr


@pytest.mark.slow
def test_uniform_in_small_moves_less_than_native(tmp_path):
    moved = {}
    for setting in (["native"], ["uniform", "--low_format", "Q2_K"]):
        done = run_script(
            "--preset", "tiny", "--workdir", tmp_path, "--budget_mib", 16, "--prompt_tokens", 5,
            "--tokens", 8, *setting[1:],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob(f"tiny-16MiB-{setting[0]}-*.json")
        tokens = json.loads(path.read_text())["tokens"]
        moved[setting[0]] = sum(token["bytes_moved"] for token in tokens)
        assert all(token["degraded"] == 0 for token in tokens)  # below what the plan asked for
    assert 0 < moved["uniform"] < 0.7 * moved["native"]


@pytest.mark.slow
def test_the_whole_in_small(tmp_path):
    """A budget of half the experts: the counts of a record add up, and a second run finds all."""
    for _ in range(2):
        done = run_script(
            "--preset", "tiny", "--workdir", tmp_path, "--budget_mib", 16, "--prompt_tokens", 5,
            "--tokens", 8,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "tiny-16MiB-native-slru.json").read_text())
        tokens = record["tokens"]
        assert len(tokens) == 8 and record["run"]["tokens"] == 8
        assert all(token["hits"] + token["misses"] == 8 * 4 for token in tokens)
        assert all(token["exits"] <= min(8, token["misses"]) for token in tokens)
        experts = 8 * 32  # of tiny
        mean_bytes = record["model"]["expert_bytes"] / experts
        for token in tokens:
            assert token["bytes_moved"] == pytest.approx(token["misses"] * mean_bytes, rel=0.2)
        assert 0 < record["pool_bytes"] <= 16 << 20
        assert record["own_memory"]["peak_bytes"] > record["pool_bytes"]
        # The second half repeats one token.
        assert tokens[-1]["misses"] < tokens[1]["misses"]
        assert record["compile_s"] > 0 and record["open_s"] < 5
        assert "| native |" in (tmp_path / "tiny.md").read_text()
        written = (tmp_path / "tiny.gguf").stat().st_mtime_ns
    assert (tmp_path / "tiny.gguf").stat().st_mtime_ns == written
