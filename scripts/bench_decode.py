"""Miss modes against the native cache at equal bytes, and what the engine itself costs.

    python scripts/bench_decode.py --out out/decode.json [--budgets_mib 1,2,4] [--before CHECKOUT]

Prints one JSON line per setting and writes all of them to --out. With --before, a checkout of
another revision, its host overhead per layer is timed in turns with this one's.
"""

import json
import tempfile
from pathlib import Path

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, reference
from hobbit_jax.evals import decode_bench, host_overhead, quality
from hobbit_jax.loading import load_model
from hobbit_jax.miss_modes import MISS_MODES
from hobbit_jax.pool_sizing import low_share
from hobbit_jax.precision import uniform_plan
from hobbit_jax.rows import machine, write_json
from hobbit_jax.store import HostExperts
from hobbit_jax.tiers import TierSpec, open_tier

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_LOW_FORMAT = flags.DEFINE_string("low_format", "Q2_K", "of the low tier")
_BUDGETS_MIB = flags.DEFINE_list("budgets_mib", ["1", "2", "4", "5"], "expert pools")
_LOW_SHARES = flags.DEFINE_list(
    "low_shares", ["0.5", "0.8"], "of the pool for low copies; 0 to 1, or adaptive"
)
_TURNS = flags.DEFINE_integer("turns", 6, "rows decoded under each setting, after a warm-up", 2)
_PROMPT, _TOKENS = 32, 64
_BEFORE = flags.DEFINE_string("before", None, "checkout of another revision to time in turns")
_HOLLOW_LAYERS = 24
_OUT = flags.DEFINE_string("out", None, "JSON file", required=True)


def settings(store: HostExperts, budget_mib: float) -> list[decode_bench.Setting]:
    """Native first; then each mode at each split that differs, and the uniform rival."""
    budget = int(budget_mib * 2**20)
    listed = [decode_bench.Setting("native", "off", budget)]
    plan = uniform_plan(store, 1)
    listed.append(decode_bench.Setting("uniform low", "wait", budget, plan=plan))
    for name, mode in MISS_MODES.items():
        if mode.low_banks == "cache":
            listed += [
                decode_bench.Setting(f"{name} {share}", name, budget, low_share=low_share(share))
                for share in _LOW_SHARES.value
            ]
    if store.tier_bytes(1) <= budget:
        listed.append(decode_bench.Setting("floor", "floor", budget))
    return listed


def main(_):
    model = load_model(_MODEL.value or reference.model_path())
    low = open_tier(model.file, model.config, TierSpec(_LOW_FORMAT.value), Path("out/tiers"))
    store = HostExperts(model.config, model.file, [low])
    texts = reference.held_out_texts("evaluation")
    windows = quality.cut_windows(
        model.tokenizer(), texts, _TURNS.value + 1, _PROMPT + _TOKENS - 1, seed=1
    )
    ids_RS = windows.ids_WS
    rows = [
        {"setting": "engine overhead", **decode_bench.cache_overhead(model, store, ids_RS[0], 3)}
    ]
    print(json.dumps(rows[-1]), flush=True)
    for budget_mib in map(float, _BUDGETS_MIB.value):
        listed = settings(store, budget_mib)
        with tqdm(total=len(listed) * len(ids_RS), desc=f"{budget_mib:g} MiB", leave=False) as bar:
            measured = decode_bench.compare(model, store, listed, ids_RS, _PROMPT, bar.update)
        for setting, result in zip(listed, measured, strict=True):
            row = {"setting": setting.name, "budget_mib": budget_mib, **result.row(measured[0])}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if _BEFORE.value is not None:
        with tempfile.TemporaryDirectory() as directory:
            hollow = Path(directory) / "hollow.gguf"
            host_overhead.write_hollow_model(hollow, _HOLLOW_LAYERS)
            for pool_mib in (None, 0.75):
                row = host_overhead.compare_trees(
                    Path(_BEFORE.value), hollow, _HOLLOW_LAYERS, 4 * _TURNS.value, pool_mib
                )
                rows.append({"setting": "host overhead", **row})
                print(json.dumps(rows[-1]), flush=True)
    write_json(Path(_OUT.value), {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
