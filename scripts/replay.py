"""Replays recorded routing through eviction policies; one JSON line each on stdout.

    python scripts/replay.py --trace T.npz --capacity 416 --policy lru,slru,recall
    python scripts/replay.py --trace T.npz --capacity 416 --policy slru --plan frequency \\
        --low_share 0.9

A trace is an .npz of expert_ids [tokens, layers, K], weights (the same shape) and seq_lens. A cold
start; demand misses only. --policy all runs every policy, Belady's bound included. --capacity is in
native slots; the plans other than native get the same bytes (`hobbit_jax/cache/replay.py`).
"""

import json
from pathlib import Path

from absl import flags

from hobbit_jax import cli
from hobbit_jax.cache.replay import PLANS, REPLAY_POLICIES, lay_out, replay
from hobbit_jax.cache.trace import read_trace

# Defaults are an expert of DeepSeek-V2-Lite, three matrices of 2048 x 1408, at 4.5 and 2.625 bits.
_WEIGHTS = 3 * 2048 * 1408

_TRACE = flags.DEFINE_string("trace", None, "the routing to replay, .npz", required=True)
_CAPACITY = flags.DEFINE_integer("capacity", None, "slots, as native experts", required=True)
_POLICY = flags.DEFINE_list(
    "policy", None, f"all, or of {', '.join(REPLAY_POLICIES)}", required=True
)
_PLAN = flags.DEFINE_enum("plan", "native", PLANS, "which selections run at low precision")
_LOW_SHARE = flags.DEFINE_float("low_share", 0.5, "of selections or pairs that run low")
_EXPERT_BYTES = flags.DEFINE_integer("expert_bytes", _WEIGHTS * 9 // 16, "of a native expert")
_LOW_BYTES = flags.DEFINE_integer("low_bytes", _WEIGHTS * 21 // 64, "of a low expert")
_SEED = flags.DEFINE_integer("seed", 0, "of --plan random")
_N_EXPERTS = flags.DEFINE_integer("n_experts", None, "of a layer; by the highest id by default")
_PROFILE = flags.DEFINE_string(
    "profile", None, "trace that pinned_static and --plan frequency learn from; --trace by default"
)


def main(_):
    names = REPLAY_POLICIES if _POLICY.value == ["all"] else _POLICY.value
    unknown = [name for name in names if name not in REPLAY_POLICIES]
    if unknown:
        raise ValueError(f"policy is {unknown[0]!r}; want all, or of {', '.join(REPLAY_POLICIES)}")
    trace = read_trace(Path(str(_TRACE.value)), _N_EXPERTS.value)
    profile = None
    if _PROFILE.value is not None:
        profile = read_trace(Path(_PROFILE.value), trace.n_experts)
        if profile.uses_LE.shape != trace.uses_LE.shape:
            raise ValueError(
                f"{profile.name} has layers and experts {list(profile.uses_LE.shape)}; "
                f"{trace.name} has {list(trace.uses_LE.shape)}"
            )
    capacity = int(_CAPACITY.value or 0)
    layout = lay_out(
        trace, capacity, _EXPERT_BYTES.value, _PLAN.value, _LOW_BYTES.value, _LOW_SHARE.value,
        profile, _SEED.value,
    )  # fmt: skip
    for name in names:
        print(json.dumps(replay(trace, name, layout, capacity, profile)), flush=True)


if __name__ == "__main__":
    cli.run(main)
