"""Replays recorded routing under cache settings, and prints a row for each policy.

    python scripts/replay.py --trace T.npz --capacity 416 --policy lru,slru,next_use
    python scripts/replay.py --trace T.npz --capacity 416 --policy slru --score frequency \\
        --low_fraction 0.9
    python scripts/replay.py --trace T.npz --capacity 416 --policy slru --miss_mode fetch_low \\
        --low_share adaptive [--profile P.npz --warm --pin_share 0.25]

A trace is an .npz of expert_ids [tokens, layers, K], weights (the same shape) and seq_lens. The
cache begins cold unless --warm fills it. --policy all runs every policy, Belady's bound included.
--capacity is in native slots, and every setting gets their bytes (`hobbit_jax/cache/replay.py`).
With a --score the least important experts, or selections, are asked for at low precision. --json
prints all figures, a JSON line for each policy.
"""

import json

import numpy as np
from absl import flags

from hobbit_jax import cli
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache.pool_sizing import low_share
from hobbit_jax.cache.replay import REPLAY_POLICIES, replay, replay_policy
from hobbit_jax.cache.trace import Trace, read_trace
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.importance.allocation import allocate
from hobbit_jax.importance.scores import RoutingProfile
from hobbit_jax.report.table import Column, table

# Defaults are an expert of DeepSeek-V2-Lite, three matrices of 2048 x 1408, at 4.5 and 2.625 bits.
_WEIGHTS = 3 * 2048 * 1408
_SCORES = ("router_weight", "frequency", "accumulated_weight", "hybrid", "random")

_TRACE = flags.DEFINE_string("trace", None, "Routing to replay, an .npz file.", required=True)
_CAPACITY = flags.DEFINE_integer(
    "capacity", None, "Size of the cache in native experts.", 1, cli.MAX_COUNT, required=True
)
_POLICY = flags.DEFINE_list(
    "policy", None, f"Policies to replay: all, or of {', '.join(REPLAY_POLICIES)}.", required=True
)
_SCORE = flags.DEFINE_enum(
    "score", None, _SCORES, "Importance score that says what runs at low precision; nothing does "
    "without one.",
)  # fmt: skip
_LOW_FRACTION = flags.DEFINE_float(
    "low_fraction", 0.5, "Share of the experts, or selections, that --score demotes.", 0.0, 1.0
)
_MISS_MODE = flags.DEFINE_enum(
    "miss_mode", "fetch", MISS_MODES, "Rule that serves a missing expert (miss_modes.py)."
)
_LOW_SHARE = flags.DEFINE_string(
    "low_share",
    "0.5",
    "Share of the bytes for low copies where the --miss_mode keeps some, 0 to 1; adaptive follows "
    "what is used.",
)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Trace that pinned_static, --score and --warm learn from; --trace by default.",
)
_WARM = flags.DEFINE_bool("warm", False, "Whether the most used experts are resident at first.")
_PIN_SHARE = flags.DEFINE_float(
    "pin_share", 0.0, "Share of each bank that --warm pins for good.", 0.0, 0.99
)
_EXPERT_BYTES = flags.DEFINE_integer(
    "expert_bytes", _WEIGHTS * 9 // 16, "Bytes of a native expert.", 1, 2**40
)
_LOW_BYTES = flags.DEFINE_integer(
    "low_bytes", _WEIGHTS * 21 // 64, "Bytes of a low expert.", 1, 2**40
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of --score random.", 0, cli.MAX_COUNT)
_N_EXPERTS = flags.DEFINE_integer(
    "n_experts", None, "Number of experts of a layer; by the highest id by default.", 1, 2**20
)
_JSON = flags.DEFINE_bool("json", False, "Whether to print JSON lines instead of a table.")

_COLUMNS = (
    Column("policy", "policy"),
    Column("hit rate", lambda row: row["hit_rate"], ".4f"),
    Column("misses", lambda row: row["misses"], "d"),
    Column("residents", lambda row: row["residents"], "d"),
    Column("bytes moved a token", lambda row: row["bytes_moved_per_token"], ".0f"),
    Column("accesses/CPU s", lambda row: row["accesses_per_cpu_s"], ".0f"),
)


def _routing_profile(trace: Trace) -> RoutingProfile:
    """What importance scores learn from, by a trace."""
    weight_P = np.bincount(
        trace.keys_TLK.ravel(), trace.weights_TLK.ravel(), minlength=trace.uses_LE.size
    )
    weights_TK = -np.sort(-trace.weights_TLK.reshape(-1, trace.weights_TLK.shape[-1]))
    return RoutingProfile(trace.uses_LE, weight_P.reshape(trace.uses_LE.shape), weights_TK)


def main(_):
    names = REPLAY_POLICIES if _POLICY.value == ["all"] else _POLICY.value
    mode, capacity = _MISS_MODE.value, int(_CAPACITY.value or 0)  # required
    trace = profile = read_trace(cli.input_file("trace", str(_TRACE.value)), _N_EXPERTS.value)
    if _PROFILE.value is not None:
        profile = read_trace(cli.input_file("profile", _PROFILE.value), trace.n_experts)
    if profile.uses_LE.shape != trace.uses_LE.shape:
        raise ValueError(
            f"{profile.name} has layers and experts {list(profile.uses_LE.shape)}; "
            f"{trace.name} has {list(trace.uses_LE.shape)}"
        )
    if _PIN_SHARE.value and not _WARM.value:
        raise ValueError("--pin_share needs --warm")
    if capacity < (k := trace.ids_TLK.shape[2]):
        raise ValueError(f"capacity is {capacity}; one step needs {k} experts at once")
    if "belady" in names and mode != "fetch":
        raise ValueError(f"policy belady knows what is fetched under --miss_mode fetch, not {mode}")
    plan, rows = None, []
    if _SCORE.value is not None:
        learned = _routing_profile(profile)
        plan = allocate(_SCORE.value, _LOW_FRACTION.value, LOW, learned, _SEED.value)
    policies = {name: replay_policy(name, trace, plan, profile) for name in names}
    for name, policy in policies.items():
        cache = CacheConfig(
            capacity * _EXPERT_BYTES.value,
            plan=plan,
            policy=policy,
            mode=mode,
            low_share=low_share(_LOW_SHARE.value),
            warm=WarmStart(profile.uses_LE, _PIN_SHARE.value) if _WARM.value else None,
        )
        figures = replay(trace, cache, (_EXPERT_BYTES.value, _LOW_BYTES.value))
        rows.append({"policy": name, "capacity": capacity, "miss_mode": mode, **figures})
    print("\n".join(map(json.dumps, rows)) if _JSON.value else table(_COLUMNS, rows))


if __name__ == "__main__":
    cli.run(main)
