"""Replay: its figures against a plain count, its plans at equal bytes, and real routing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hobbit_jax.cache.policies import LRU, Policy, Step
from hobbit_jax.cache.replay import REPLAY_POLICIES, lay_out, replay, walk
from hobbit_jax.cache.trace import read_trace

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "replay.py"
TOKENS, LAYERS, EXPERTS, K = 400, 4, 16, 3


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory):
    """Four layers of 16 experts with hot experts."""
    rng = np.random.default_rng(0)
    popularity_LE = rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS) + 0.01
    popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
    noise_TLE = rng.gumbel(size=(TOKENS, LAYERS, EXPERTS))
    ids_TLK = np.argsort(-(np.log(popularity_LE) + noise_TLE))[..., :K].astype(np.uint8)
    weights_TLK = rng.dirichlet(np.ones(K), (TOKENS, LAYERS)).astype(np.float32) * 0.7
    path = tmp_path_factory.mktemp("traces") / "tiny.npz"
    np.savez(path, expert_ids=ids_TLK, weights=weights_TLK, seq_lens=np.array([150, 50, 200]))
    return path


@pytest.fixture(scope="module")
def trace(trace_path):
    return read_trace(trace_path)


def lru_misses(steps, slots: int) -> list[int]:
    """Misses per step by a list in order of use; empty steps have none."""
    recent, misses = [], []
    for keys in steps:
        missing = [key for key in keys if key not in recent]
        recent = [key for key in recent if key not in keys] + [k for k in keys if k in recent]
        recent = (recent + missing)[-slots:]
        misses.append(len(missing))
    return misses


def test_figures_are_a_plain_count(trace):
    row = replay(trace, "lru", lay_out(trace, 20, 1000), 20)
    misses_TL = np.reshape(lru_misses(trace.keys_TLK.reshape(-1, K).tolist(), 20), (TOKENS, -1))
    assert row["misses"] == misses_TL.sum() and row["accesses"] == TOKENS * LAYERS * K
    assert row["hits"] + row["misses"] == row["accesses"]
    assert row["hit_rate"] == pytest.approx(row["hits"] / row["accesses"])
    assert row["hit_rate_L"] == pytest.approx(1 - misses_TL.sum(axis=0) / (TOKENS * K))
    assert row["bytes_moved"] == 1000 * row["misses"]
    assert row["bytes_moved_per_token"] == pytest.approx(1000 * row["misses"] / TOKENS)
    assert (
        row["wait_rate"] == pytest.approx(1 - row["hit_rate"])
        and row["residents"] == row["slots"] == 20
    )


def test_a_policy_is_called_as_the_engine_calls_it(trace):
    calls = []

    class Recorder(LRU):
        access_all = Policy.access_all  # a call of `access` for each key

        def begin_step(self, step):
            calls.append(step)

        def access(self, key, weight=1.0, native=True):
            calls.append(("access", key, round(weight, 6), native))
            return not super().access_all((key,), (weight,), native)

        def admit(self, key, keep=()):
            calls.append(("admit", key, sorted(keep)))
            return super().admit(key, keep)

    layout = lay_out(trace, 24, 900, "router_weight", low_bytes=300, low_share=0.4)
    for bank in layout.banks:
        calls.clear()
        walk(trace, Recorder(bank.slots), bank)
        wanted, resident = [], LRU(bank.slots)
        for token, layer in np.ndindex(TOKENS, LAYERS):
            served_K = bank.served_TLK[token, layer]
            keys = trace.keys_TLK[token, layer][served_K].tolist()
            if not keys:
                continue
            began = max(start for start in (0, 150, 200) if start <= token)
            wanted.append(Step(token, layer, token - began))
            weights = trace.weights_TLK[token, layer][served_K].tolist()
            for key, weight in zip(keys, weights, strict=True):
                wanted.append(("access", key, round(weight, 6), bank.precision == "native"))
            for key in [key for key in keys if not resident.access(key)]:
                wanted.append(("admit", key, sorted(keys)))
                resident.admit(key, keys)
        assert calls == wanted


def test_selections_by_router_weight_have_two_banks(trace):
    layout = lay_out(trace, 24, 900, "router_weight", low_bytes=300, low_share=0.4)
    native, low = layout.banks
    assert 24 * 900 - 300 < native.slots * 900 + low.slots * 300 <= 24 * 900
    assert (native.served_TLK != low.served_TLK).all()
    assert layout.degraded_share == low.served_TLK.mean() == pytest.approx(0.4, abs=0.001)
    assert trace.weights_TLK[low.served_TLK].max() < layout.threshold
    row = replay(trace, "lru", layout, 24)
    for precision, bank in zip(row["precisions"], layout.banks, strict=True):
        keys, served = (a.reshape(-1, K).tolist() for a in (trace.keys_TLK, bank.served_TLK))
        steps = [
            [k for k, s in zip(*step, strict=True) if s] for step in zip(keys, served, strict=True)
        ]
        assert precision["misses"] == sum(lru_misses(steps, bank.slots))
        assert precision["bytes_moved"] == precision["misses"] * bank.expert_bytes
    assert row["bytes_moved"] == sum(precision["bytes_moved"] for precision in row["precisions"])
    # An expert may be there at both precisions; then it takes two slots and is one resident.
    assert max(native.slots, low.slots) < row["residents"] < row["slots"]


def test_pairs_by_frequency_are_in_one_bank_each(trace):
    layout = lay_out(trace, 24, 900, "frequency", low_bytes=300, low_share=0.75)
    native, low = (set(trace.keys_TLK[bank.served_TLK].tolist()) for bank in layout.banks)
    assert not native & low and len(native) == LAYERS * EXPERTS // 4
    uses_P = trace.uses_LE.ravel()
    assert min(uses_P[sorted(native)]) >= max(uses_P[sorted(low)])
    # A native expert makes room for three: the more run low, the more are resident.
    shares = (0.0, 0.5, 0.75, 1.0)
    layouts = [lay_out(trace, 24, 900, "frequency", 300, share) for share in shares]
    residents = [replay(trace, "lru", layout, 24)["residents"] for layout in layouts]
    assert residents == sorted(residents) and residents[0] == 24 and residents[-1] == 64


def test_who_is_seldom_used_comes_from_the_profile(trace, tmp_path):
    reversed_ids = (EXPERTS - 1 - trace.ids_TLK).astype(np.uint8)
    path = tmp_path / "profile.npz"
    np.savez(path, expert_ids=reversed_ids, weights=trace.weights_TLK, seq_lens=[TOKENS])
    profile = read_trace(path, EXPERTS)
    own, foreign = (
        lay_out(trace, 24, 900, "frequency", 300, 0.5, p).degraded_share for p in (None, profile)
    )
    assert own < 0.5 < foreign
    rows = [replay(trace, "pinned_static", lay_out(trace, 24, 900), 24, p) for p in (None, profile)]
    assert rows[0]["hit_rate"] > rows[1]["hit_rate"] and rows[1]["profile"] == "profile.npz"


def test_on_the_floor_nobody_waits(trace):
    layout = lay_out(trace, 40, 900, "floor", low_bytes=300)
    slots = (40 * 900 - 64 * 300) // 900
    assert layout.banks[0].slots == slots
    row, native = replay(trace, "lru", layout, 40), lay_out(trace, slots, 900)
    assert row["residents"] == 64 and row["slots"] == 64 + slots
    assert row["wait_rate"] == 0.0 and row["degraded_share"] == 1 - row["hit_rate"]
    assert row["hit_rate"] == replay(trace, "lru", native, slots)["hit_rate"]


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_prints_a_line_per_policy(trace_path):
    done = run_script("--trace", trace_path, "--capacity", 24, "--policy", "all", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["policy"] for row in rows] == list(REPLAY_POLICIES)
    bound = rows[-1]["hit_rate"]
    assert all(0 < row["hit_rate"] <= bound and row["accesses_per_s"] > 0 for row in rows)
    assert all(len(row["hit_rate_L"]) == LAYERS and row["capacity"] == 24 for row in rows)


def test_script_prints_a_table_for_people(trace_path):
    done = run_script("--trace", trace_path, "--capacity", 24, "--policy", "lru,slru")
    head, _, *rows = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (0, "")
    assert [row[0] for row in rows] == ["lru", "slru"]
    assert all(0 < float(row[head.index("hit rate")]) < 1 for row in rows)


def spoil(trace_path, path, **changes):
    with np.load(trace_path) as arrays:
        new = {**arrays, **changes}
    np.savez(path, **{name: array for name, array in new.items() if array is not None})


BAD_TRACES = {
    "has no weights; it has expert_ids, seq_lens": {"weights": None},
    r"weights is float32 \[2, 2\]; want floats of": {"weights": np.zeros((2, 2), np.float32)},
    "weights holds negative, infinite or NaN": {"weights": np.full((400, 4, 3), np.nan, "f4")},
    r"expert_ids is float64 \[400, 4, 3\]": {"expert_ids": np.zeros((400, 4, 3))},
    "expert_ids name an expert twice": {"expert_ids": np.zeros((400, 4, 3), int)},
    "expert_ids go from -1 to 1; want 0 to 1": {"expert_ids": np.tile([-1, 0, 1], (400, 4, 1))},
    "seq_lens adds up to 7 tokens; expert_ids has 400": {"seq_lens": np.array([3, 4])},
    r"seq_lens is int64 \[2\]; want positive": {"seq_lens": np.array([400, 0])},
}


@pytest.mark.parametrize("message", BAD_TRACES)
def test_bad_traces_are_refused(message, trace_path, tmp_path):
    spoil(trace_path, tmp_path / "bad.npz", **BAD_TRACES[message])
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / "bad.npz")


def test_what_is_no_trace_is_refused(trace_path, tmp_path):
    with pytest.raises(ValueError, match="expert_ids go from 0 to 15; want 0 to 7"):
        read_trace(trace_path, n_experts=8)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="holds one array"):
        read_trace(tmp_path / "array.npy")
    (tmp_path / "cut.npz").write_bytes(trace_path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        read_trace(tmp_path / "cut.npz")


def test_bad_settings_are_refused(trace):
    for arguments, message in (
        ((2, 900), "capacity is 2; one step needs 3 experts at once"),
        ((9, 0), "expert_bytes is 0"),
        ((9, 900, "floor", 900), "low_bytes is 900; want 1 to 899"),
        ((9, 900, "frequency", 300, 1.5), "low_share is 1.5"),
        ((3, 900, "router_weight", 300), "one step at both precisions needs 4"),
        ((24, 900, "floor", 300), "one native step need 25"),
        ((24, 900, "other", 300), "plan is 'other'; want one of native, router_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            lay_out(trace, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "fifo", "--capacity", "24"), "error: policy is 'fifo'; want all, or of lru"),
        (("--policy", "lru", "--capacity", "2"), "error: capacity is 2; one step needs 3"),
    ],
)
def test_script_says_what_is_wrong(trace_path, arguments, message):
    done = run_script("--trace", trace_path, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.fixture(scope="module", params=["intent", "law"])
def real_trace(request, data_dir):
    path = data_dir / "traces" / f"deepseek_v2_lite_{request.param}.npz"
    if not path.is_file():
        pytest.skip(f"no trace at {path}")
    return request.param, read_trace(path)


# Over the first 2,000 tokens of real routing at 416 slots of 1,664. LRU and SLRU are recorded; a
# plain dictionary gives the two of LRU too.
RECORDED = {("intent", "lru"): 0.483038, ("intent", "slru"): 0.480471}
RECORDED |= {("law", "lru"): 0.474487, ("law", "slru"): 0.478006}


def head(trace, n_tokens):
    return type(trace)(
        trace.name, trace.ids_TLK[:n_tokens], trace.weights_TLK[:n_tokens],
        trace.position_T[:n_tokens], trace.n_experts,
    )  # fmt: skip


def test_real_routing(real_trace):
    name, trace = real_trace[0], head(real_trace[1], 2000)
    layout = lay_out(trace, 416, 1)
    rates = {
        policy: replay(trace, policy, layout, 416)["hit_rate"]
        for policy in ("lru", "slru", "decayed_lfu", "next_use", "belady")
    }
    for policy in ("lru", "slru"):
        assert rates[policy] == pytest.approx(RECORDED[name, policy], abs=1e-6)
    best = max(rates[policy] for policy in ("lru", "slru", "decayed_lfu"))
    assert rates["next_use"] > best + 0.05
    assert rates["next_use"] - rates["lru"] > 0.3 * (rates["belady"] - rates["lru"])


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [208, 416, 832])
def test_all_of_real_routing(real_trace, capacity):
    _, trace = real_trace
    layout = lay_out(trace, capacity, 1)
    rates = {
        policy: replay(trace, policy, layout, capacity)["hit_rate"]
        for policy in ("lru", "slru", "decayed_lfu", "next_use", "belady")
    }
    assert rates["slru"] > rates["lru"] - 0.005
    best = max(rates[policy] for policy in ("lru", "slru", "decayed_lfu"))
    assert rates["next_use"] > best + 0.03
    assert rates["next_use"] - rates["lru"] > 0.2 * (rates["belady"] - rates["lru"])
