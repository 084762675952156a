"""Replay: its figures against a plain count, its plans at equal bytes, and real routing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hobbit_jax.cache.adaptive_split import SplitRule
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, Observer
from hobbit_jax.cache.counter import Replay
from hobbit_jax.cache.miss_modes import LOW
from hobbit_jax.cache.replay import REPLAY_POLICIES, replay, replay_policy
from hobbit_jax.cache.trace import read_trace
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.importance.allocation import allocate
from hobbit_jax.importance.scores import RoutingProfile
from pallas_kernels.reference import Signature

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


def replayed(trace, policy: str, slots: int, expert_bytes=(900,), profile=None, **settings):
    """The row of a trace in the bytes of so many native slots."""
    policy = replay_policy(policy, trace, settings.get("plan"), profile)
    cache = CacheConfig(slots * expert_bytes[0], policy=policy, **settings)
    return replay(trace, cache, expert_bytes)


def learned(trace) -> RoutingProfile:
    """As much of a profile as the scores here read."""
    return RoutingProfile(
        trace.uses_LE, np.zeros(trace.uses_LE.shape), -np.sort(-trace.weights_TLK.reshape(-1, K))
    )


def demoted(trace, score: str, share: float, profile=None):
    return allocate(score, share, LOW, learned(profile or trace))


def requested_TLK(trace, plan) -> np.ndarray:
    return np.stack([plan.assign(r.layer, r.ids_TK, r.weights_TK) for r in trace.layers()], 1)


def test_figures_are_a_plain_count(trace):
    row = replayed(trace, "lru", 20, (1000,))
    misses_TL = np.reshape(lru_misses(trace.keys_TLK.reshape(-1, K).tolist(), 20), (TOKENS, -1))
    assert row["misses"] == misses_TL.sum() and row["hits"] == TOKENS * LAYERS * K - row["misses"]
    assert row["hit_rate"] == pytest.approx(row["hits"] / (TOKENS * LAYERS * K))
    assert row["bytes_moved"] == 1000 * row["misses"]
    assert row["bytes_moved_per_token"] == pytest.approx(1000 * row["misses"] / TOKENS)
    assert row["round_trips_per_token"] == pytest.approx((misses_TL > 0).sum() / TOKENS)
    assert row["low_share"] == 0 and row["residents"] == 20 == row["slots"]["native"]


@pytest.mark.parametrize("score", [None, "frequency", "router_weight"])
@pytest.mark.parametrize("name", REPLAY_POLICIES)
def test_a_policy_by_itself_decides_what_the_controller_decides(trace, name, score):
    """Policies play demand misses alone; an observer has the controller play each step."""
    plan, part = None if score is None else demoted(trace, score, 0.4), trace.part(0, 220)
    banks = Signature("native", "", ""), Signature("low", "", "")
    layout = BankLayout(EXPERTS, K, [[bank] * LAYERS for bank in banks], dict.fromkeys(banks, 1))
    slots = dict(zip(banks, (12, 9) if plan else (20,), strict=False))
    cache = CacheConfig(plan=plan, policy=replay_policy(name, part, plan))
    alone, watched = Replay(layout, slots, cache), Replay(layout, slots, cache)
    watched.controller.observers.append(Observer())
    for replay_ in (alone, watched):
        replay_.play(part.part(0, 100))
        replay_.play(part.part(100, 220))
    assert alone.counts == watched.counts and alone.counts.misses > 300
    assert set(alone.controller.resident()) == set(watched.controller.resident())
    assert (alone.resident_pLE == watched.resident_pLE).all()


def test_selections_by_router_weight_have_two_banks(trace):
    plan = demoted(trace, "router_weight", 0.4)
    row = replayed(trace, "lru", 24, (900, 300), plan=plan)
    slots = row["slots"]
    assert 24 * 900 - 300 < slots["native"] * 900 + slots["low"] * 300 <= 24 * 900
    assert row["low_share"] == pytest.approx(0.4, abs=0.001) and row["degraded_share"] == 0
    asked_TLK = requested_TLK(trace, plan)
    assert trace.weights_TLK[asked_TLK == LOW].max() <= trace.weights_TLK[asked_TLK == 0].min()
    misses = 0
    for precision, bank in enumerate(slots):
        keys, served = (a.reshape(-1, K).tolist() for a in (trace.keys_TLK, asked_TLK == precision))
        steps = [
            [k for k, s in zip(*step, strict=True) if s] for step in zip(keys, served, strict=True)
        ]
        misses += sum(lru_misses(steps, slots[bank]))
    assert row["misses"] == misses
    # An expert may be there at both precisions; then it takes two slots and is one resident.
    assert max(slots.values()) < row["residents"] < sum(slots.values())


def test_pairs_by_frequency_are_in_one_bank_each(trace):
    uses_P, low_TLK = trace.uses_LE.ravel(), requested_TLK(trace, demoted(trace, "frequency", 0.75))
    native, low = (set(trace.keys_TLK[low_TLK == p].tolist()) for p in (0, LOW))
    assert not native & low and len(native) == LAYERS * EXPERTS // 4
    assert min(uses_P[sorted(native)]) >= max(uses_P[sorted(low)])
    # A native expert makes room for three: the more run low, the more are resident.
    residents = [
        replayed(trace, "lru", 24, (900, 300), plan=demoted(trace, "frequency", share))["residents"]
        for share in (0.0, 0.5, 0.75, 1.0)
    ]
    assert residents == sorted(residents) and residents[0] == 24 and residents[-1] == 64


def test_who_is_seldom_used_comes_from_the_profile(trace, tmp_path):
    reversed_ids = (EXPERTS - 1 - trace.ids_TLK).astype(np.uint8)
    path = tmp_path / "profile.npz"
    np.savez(path, expert_ids=reversed_ids, weights=trace.weights_TLK, seq_lens=[TOKENS])
    profile = read_trace(path, EXPERTS)
    own, foreign = (
        replayed(trace, "lru", 24, (900, 300), plan=demoted(trace, "frequency", 0.5, p))
        for p in (None, profile)
    )
    assert own["low_share"] < 0.5 < foreign["low_share"]
    own, foreign = (replayed(trace, "pinned_static", 24, profile=p) for p in (None, profile))
    assert own["hit_rate"] > foreign["hit_rate"]


def test_a_mode_with_a_split_that_follows_what_is_used(trace):
    """The division is only tried where a sequence begins, and a warm start is kept through it."""
    settings = {"mode": "fetch_low", "warm": WarmStart(trace.uses_LE, 0.2)}
    rule = SplitRule(first_tokens=60, window_tokens=64)
    rows = [
        replay(trace, CacheConfig(24 * 900, low_share=share, **settings), (900, 300), rule)
        for share in (0.1, "adaptive", 0.9)
    ]
    (after, share), *_ = rows[1]["repartitions"]
    assert after in (150, 200) and share != 0.5 and not rows[0]["repartitions"]
    assert rows[0]["residents"] < rows[2]["residents"] and rows[1]["degraded_share"] > 0


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_prints_a_line_per_policy(trace_path):
    done = run_script("--trace", trace_path, "--capacity", 24, "--policy", "all", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["policy"] for row in rows] == list(REPLAY_POLICIES)
    bound = rows[-1]["hit_rate"]
    assert all(0 < row["hit_rate"] <= bound and row["accesses_per_cpu_s"] > 0 for row in rows)
    assert all(row["residents"] == row["capacity"] == 24 for row in rows)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "fifo"), "error: policy is 'fifo'; want all, or of lru"),
        (("--policy", "lru", "--capacity", "2"), "error: capacity is 2; one step needs 3"),
        (("--policy", "lru", "--low_share", "1.5"), "error: low_share is '1.5'; want adaptive or"),
        (("--policy", "lru", "--pin_share", "0.5"), "error: --pin_share needs --warm"),
        (("--policy", "all", "--miss_mode", "floor"), "error: policy belady knows what is fetched"),
        (("--policy", "lru", "--miss_mode", "floor"), "error: the expert pool's budget of"),
    ],
)
def test_script_says_what_is_wrong(trace_path, arguments, message):
    done = run_script("--trace", trace_path, "--capacity", "12", *arguments)
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


def test_real_routing(real_trace):
    name, trace = real_trace[0], real_trace[1].part(0, 2000)
    rates = {
        policy: replayed(trace, policy, 416, (1,))["hit_rate"]
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
    rates = {
        policy: replayed(trace, policy, capacity, (1,))["hit_rate"]
        for policy in ("lru", "slru", "decayed_lfu", "next_use", "belady")
    }
    assert rates["slru"] > rates["lru"] - 0.005
    best = max(rates[policy] for policy in ("lru", "slru", "decayed_lfu"))
    assert rates["next_use"] > best + 0.03
    assert rates["next_use"] - rates["lru"] > 0.2 * (rates["belady"] - rates["lru"])
