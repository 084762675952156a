"""Replays recorded routing through eviction policies; one line each.

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
from typing import Any

from absl import flags

from hobbit_jax import cli
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool_sizing import ADAPTIVE, low_share
from hobbit_jax.cache.replay import PLANS, REPLAY_POLICIES, lay_out, replay
from hobbit_jax.cache.trace import read_trace
from hobbit_jax.inference.mode_replay import ModeSetting, replay_mode

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

# Column → its width and format.
_COLUMNS = {
    "policy": (14, "{}"),
    "hit_rate": (9, "{:.4f}"),
    "misses": (11, "{}"),
    "residents": (10, "{}"),
    "bytes_moved_per_token": (22, "{:.0f}"),
    "accesses_per_s": (15, "{:.0f}"),
}


def show(row: dict[str, Any], first: bool) -> None:
    """Prints the row of one policy as soon as it is there."""
    if _JSON.value:
        print(json.dumps(row), flush=True)
        return
    if first:
        print(" ".join(f"{name:>{width}}" for name, (width, _) in _COLUMNS.items()))
    cells = (
        f"{form.format(row[name]) if name in row else '-':>{width}}"
        for name, (width, form) in _COLUMNS.items()
    )
    print(" ".join(cells), flush=True)


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
        for name in names:
            setting = ModeSetting(
                _MISS_MODE.value, name, capacity, expert_bytes, low_bytes, share, _PIN_SHARE.value
            )
            uses_LE = None if profile is None else profile.uses_LE
            show(replay_mode(trace, setting, uses_LE), name == names[0])
        return
    if share == ADAPTIVE or _PIN_SHARE.value:
        raise ValueError("an adaptive low_share and a pin_share need a --miss_mode")
    layout = lay_out(
        trace, capacity, expert_bytes, _PLAN.value, low_bytes, share, profile, _SEED.value
    )
    for name in names:
        show(replay(trace, name, layout, capacity, profile), name == names[0])


if __name__ == "__main__":
    cli.run(main)
