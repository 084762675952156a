"""Tables of plans at equal bytes: the cells, the random control, and the script on two traces."""

import json
import subprocess
import sys
from pathlib import Path

import equal_bytes
import numpy as np
import pytest

from hobbit_jax.cache.replay import lay_out
from hobbit_jax.cache.trace import read_trace

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "dev" / "trace_tables.py"
TOKENS, LAYERS, EXPERTS, K = 120, 3, 16, 3


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for name in ("one", "two"):
        popularity_LE = rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS) + 0.01
        noise_TLE = rng.gumbel(size=(TOKENS, LAYERS, EXPERTS))
        ids_TLK = np.argsort(-(np.log(popularity_LE) + noise_TLE))[..., :K]
        made.append(tmp_path / f"{name}.npz")
        weights_TLK = np.full(ids_TLK.shape, 1 / K, np.float32)
        np.savez(made[-1], expert_ids=ids_TLK, weights=weights_TLK, seq_lens=[TOKENS])
    return made


def test_the_control_is_drawn_by_its_seed_alone(paths):
    one, two = (read_trace(path, EXPERTS) for path in paths)

    def low_pairs(trace, seed, share=0.75):
        low = lay_out(trace, 20, 900, "random", 300, share, seed=seed).banks[1]
        return set(trace.keys_TLK[low.served_TLK].tolist())

    used = set(one.keys_TLK.ravel().tolist()) & set(two.keys_TLK.ravel().tolist())
    assert low_pairs(one, 3) & used == low_pairs(two, 3) & used
    assert low_pairs(one, 3) != low_pairs(one, 4)
    assert 0.6 < len(low_pairs(one, 3)) / len(set(one.keys_TLK.ravel().tolist())) < 0.9


def run_script(paths, out):
    command = [
        sys.executable, str(SCRIPT), "--traces", ",".join(map(str, paths)), "--out", str(out),
        "--capacities", "12,30", "--expert_bytes", "900", "--low_bytes", "300",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_writes_rows_and_tables(paths, tmp_path):
    out = tmp_path / "traces.md"
    done = run_script(paths, out)
    assert done.returncode == 0, done.stderr
    rows_path = tmp_path / "traces" / "one.jsonl"
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    assert len(rows) == len(equal_bytes.cells([12, 30]))
    native = {row["capacity"]: row for row in rows if row["plan"] == "native"}
    for row in rows:
        if "status" in row:
            # 48 low pairs of 300 bytes and a native step take more than 12 times 900.
            assert row["plan"] == "floor" and row["capacity"] == 12
            continue
        held = sum(
            precision["slots"] * precision["expert_bytes"] for precision in row["precisions"]
        )
        if row["plan"] == "floor":
            held += LAYERS * EXPERTS * 300
        assert held <= row["capacity"] * 900
        assert row["accesses"] == native[row["capacity"]]["accesses"] == TOKENS * LAYERS * K
    shares = {row["low_share"]: row["degraded_share"] for row in rows if row["own_profile"]}
    foreign = {
        row["low_share"]: row["degraded_share"]
        for row in rows
        if row["plan"] == "frequency" and not row["own_profile"]
    }
    assert all(shares[share] < foreign[share] for share in equal_bytes.SHARES)
    text = out.read_text()
    assert text.count("| native | 12 | 1.00 |") == text.count("| native | 30 | 1.00 |") == 2
    assert text.count("50% low by random (control)") == 4  # three draws in a row of each table
    # What is there is not replayed again.
    spoilt = [{**row, "hit_rate": 0.125} for row in rows]
    rows_path.write_text("\n".join(map(json.dumps, spoilt)))
    assert run_script(paths, out).returncode == 0 and "| 0.125 |" in out.read_text()


def test_script_wants_two_traces_of_a_kind(paths, tmp_path):
    done = run_script(paths[:1], tmp_path / "t.md")
    assert done.returncode == 2 and done.stderr == "error: --traces names 1 files; want 2\n"
