"""A decode at full scale: how its record counts, its table, and the whole in small."""

import subprocess
import sys
from pathlib import Path

import pytest

from hobbit_jax.evals.full_scale import STUDY, Run, decode_figures
from hobbit_jax.evals.measure import Counts, Turn
from hobbit_jax.record import Record, measured, read_records
from hobbit_jax.report.scale_tables import scale_table

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "scale.py"


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
    assert figures["demoted_selection_share"] == pytest.approx(12 / 32)
    rates = figures["decode_tokens_per_s"]
    assert rates["median"] == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert (rates["low"], rates["high"]) == pytest.approx((1 / 7, 1.0))
    assert figures["bytes_moved_per_token"] == 3_000_000
    constant = decode_figures(made_turn(first, rest[1], rest[1]))
    assert constant["cpu_ms_without_miss"] is None and constant["cpu_ms_per_miss"] is None


def made_record(setting: str, budget_bytes: int | None, moved: list[int]) -> Record:
    turn = made_turn(
        (9, 8, made_counts(2, 999, 1, 0)), *((1, 2, made_counts(2, b, 3, 4)) for b in moved)
    )
    run = Run(Path("m.gguf"), budget_bytes, 8, len(turn.tokens), setting=setting,
              low_format=None if setting == "native" else "Q2_K")  # fmt: skip
    return Record(STUDY, run.asked, **vars(measured({"slots_total": 7, **decode_figures(turn)})))


def test_the_table_compares_what_decoded_the_same_tokens():
    records = [
        made_record("fetch_low", 2**30, [1_000_000, 3_000_000]),
        made_record("native", 2**30, [4_000_000, 4_000_000]),
        made_record("fetch_low", None, [0, 0]),  # nobody decoded natively with all resident
        made_record("fetch_low", 2**30, [1_000_000, 3_000_000, 5_000_000]),  # another workload
    ]
    native, low, more, full = [line.split(" | ") for line in scale_table(records).splitlines()[2:]]
    cpu = "2.00 [2.00, 2.00]"
    assert native == ["| 1", "native", "7", "0.750", "2", "3.0", "4", "0.500", cpu, "1.00× |"]
    assert low == ["| 1", "fetch_low Q2_K", "7", "0.750", "2", "3.0", "2", "0.500", cpu, "0.50× |"]
    assert more[6] == "3" and more[-1] == full[-1] == "– |" and full[0] == "| all"


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_mistake_is_one_line(tmp_path):
    done = run_script("--workdir", tmp_path, "--model", tmp_path / "none.gguf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error:") and "none.gguf cannot be read" in done.stderr


@pytest.mark.slow
def test_the_whole_in_small(tmp_path):
    """A budget of a quarter of the experts: counts add up, and uniform moves less than native."""
    moved, written = {}, None
    for setting, flags in (("native", ()), ("uniform", ("--low_format", "Q2_K"))):
        done = run_script(
            "--preset", "tiny", "--workdir", tmp_path, "--budget_mib", 8, "--prompt_tokens", 5,
            "--tokens", 8, *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"| {setting}" in done.stdout
        model = (tmp_path / "tiny.gguf").stat().st_mtime_ns
        assert written in (None, model)  # the second run finds the model
        written = model
        found = read_records(tmp_path).of(STUDY)
        (record,) = (r for r in found if r.asked.setting["setting"] == setting)
        metrics, tokens = record.metrics, record.samples["token_counts"]
        assert len(tokens) == 8
        assert all(token["hits"] + token["misses"] == 8 * 4 for token in tokens)
        assert all(token["host_round_trips"] <= min(8, token["misses"]) for token in tokens)
        assert all(token["demoted"] == 0 for token in tokens)  # below what the plan asked for
        moved[setting] = sum(token["bytes_moved"] for token in tokens)
        if setting == "native":
            mean_bytes = metrics["model_expert_bytes"] / (8 * 32)  # of tiny
            for token in tokens:
                assert token["bytes_moved"] == pytest.approx(token["misses"] * mean_bytes, rel=0.2)
            # The second half repeats one token.
            assert tokens[-1]["misses"] < tokens[1]["misses"]
        assert 0 < metrics["pool_device_bytes"] <= 8 << 20
        assert metrics["own_memory_peak_bytes"] > metrics["pool_device_bytes"]
        assert metrics["compile_s"] > 0
    assert 0 < moved["uniform"] < 0.7 * moved["native"]
