"""Replays recorded routing through eviction policies, and prints a row for each.

    python scripts/replay.py --trace T.npz --capacity 416 --policy lru,slru,next_use
    python scripts/replay.py --trace T.npz --capacity 416 --policy slru --plan frequency \\
        --low_share 0.9
    python scripts/replay.py --trace T.npz --capacity 416 --policy slru --miss_mode fetch_low \\
        --low_share adaptive [--profile P.npz --pin_share 0.25]

A trace is an .npz of expert_ids [tokens, layers, K], weights (the same shape) and seq_lens. A cold
start; demand misses only. --policy all runs every policy, Belady's bound included. --capacity is in
native slots; the plans other than native get the same bytes (`hobbit_jax/cache/replay.py`). With a
--miss_mode (`hobbit_jax/inference/mode_replay.py`) --profile warms the cache up. --json prints all
figures, a JSON line for each policy.
"""

import json

from absl import flags

from hobbit_jax import cli
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool_sizing import ADAPTIVE, low_share
from hobbit_jax.cache.replay import PLANS, REPLAY_POLICIES, lay_out, replay
from hobbit_jax.cache.trace import read_trace
from hobbit_jax.inference.mode_replay import ModeSetting, replay_mode
from hobbit_jax.report.table import Column, table

# Defaults are an expert of DeepSeek-V2-Lite, three matrices of 2048 x 1408, at 4.5 and 2.625 bits.
_WEIGHTS = 3 * 2048 * 1408

_TRACE = flags.DEFINE_string("trace", None, "Routing to replay, an .npz file.", required=True)
_CAPACITY = flags.DEFINE_integer(
    "capacity", None, "Size of the cache in native experts.", 1, cli.MAX_COUNT, required=True
)
_POLICY = flags.DEFINE_list(
    "policy", None, f"Policies to replay: all, or of {', '.join(REPLAY_POLICIES)}.", required=True
)
_PLAN = flags.DEFINE_enum("plan", "native", PLANS, "Plan that says what runs at low precision.")
_LOW_SHARE = flags.DEFINE_string(
    "low_share",
    "0.5",
    "Share of the selections or pairs that run low, 0 to 1; under a --miss_mode, of the bytes for "
    "low copies, where adaptive follows what is used.",
)
_MISS_MODE = flags.DEFINE_enum(
    "miss_mode", None, MISS_MODES, "Rule that serves misses, instead of a plan (miss_modes.py)."
)
_PIN_SHARE = flags.DEFINE_float(
    "pin_share", 0.0, "Share of each bank that --profile pins for good.", 0.0, 0.99
)
_EXPERT_BYTES = flags.DEFINE_integer(
    "expert_bytes", _WEIGHTS * 9 // 16, "Bytes of a native expert.", 1, 2**40
)
_LOW_BYTES = flags.DEFINE_integer(
    "low_bytes", _WEIGHTS * 21 // 64, "Bytes of a low expert.", 1, 2**40
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of --plan random.", 0, cli.MAX_COUNT)
_N_EXPERTS = flags.DEFINE_integer(
    "n_experts", None, "Number of experts of a layer; by the highest id by default.", 1, 2**20
)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Trace to learn from: pinned_static and --plan frequency (--trace by default), and the warm "
    "start of a miss mode (cold by default).",
)
_JSON = flags.DEFINE_bool("json", False, "Whether to print JSON lines instead of a table.")

_COLUMNS = (
    Column("policy", "policy"),
    Column("hit rate", lambda row: row.get("hit_rate"), ".4f"),
    Column("misses", lambda row: row.get("misses"), "d"),
    Column("residents", lambda row: row.get("residents"), "d"),
    Column("bytes moved a token", lambda row: row.get("bytes_moved_per_token"), ".0f"),
    Column("accesses/s", lambda row: row.get("accesses_per_s"), ".0f"),
)


def main(_):
    names = REPLAY_POLICIES if _POLICY.value == ["all"] else _POLICY.value
    unknown = [name for name in names if name not in REPLAY_POLICIES]
    if unknown:
        raise ValueError(f"policy is {unknown[0]!r}; want all, or of {', '.join(REPLAY_POLICIES)}")
    trace = read_trace(cli.input_file("trace", str(_TRACE.value)), _N_EXPERTS.value)
    profile = None
    if _PROFILE.value is not None:
        profile = read_trace(cli.input_file("profile", _PROFILE.value), trace.n_experts)
        if profile.uses_LE.shape != trace.uses_LE.shape:
            raise ValueError(
                f"{profile.name} has layers and experts {list(profile.uses_LE.shape)}; "
                f"{trace.name} has {list(trace.uses_LE.shape)}"
            )
    capacity = int(_CAPACITY.value or 0)  # required
    expert_bytes, low_bytes = _EXPERT_BYTES.value, _LOW_BYTES.value
    share = low_share(_LOW_SHARE.value)
    if _MISS_MODE.value is not None:
        uses_LE = None if profile is None else profile.uses_LE
        of_mode = (capacity, expert_bytes, low_bytes, share, _PIN_SHARE.value)
        rows = (
            replay_mode(trace, ModeSetting(_MISS_MODE.value, name, *of_mode), uses_LE)
            for name in names
        )
    elif share == ADAPTIVE or _PIN_SHARE.value:
        raise ValueError("an adaptive low_share and a pin_share need a --miss_mode")
    else:
        layout = lay_out(
            trace, capacity, expert_bytes, _PLAN.value, low_bytes, share, profile, _SEED.value
        )
        rows = (replay(trace, name, layout, capacity, profile) for name in names)
    print("\n".join(map(json.dumps, rows)) if _JSON.value else table(_COLUMNS, rows))


if __name__ == "__main__":
    cli.run(main)
