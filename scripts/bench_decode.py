"""Miss modes and prefetch against the native cache at equal bytes.

    python scripts/bench_decode.py --out out/decode.json [--budgets_mib 1,2,4] [--link_gb_s card]

Prints one JSON line per setting and writes all of them to --out. On a CPU a copy costs next to
nothing; --link_gb_s emulates a slower link, and every row says so: decode is then timed by the
processor's time and the waits for the link, so that other load does not show.
"""

import json
from pathlib import Path

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, reference
from hobbit_jax.atomic import write_json
from hobbit_jax.cache.link import DirectLink, PacedLink
from hobbit_jax.cache.pool_sizing import low_share
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals import decode_bench, quality
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.experts.tiers import TierSpec, open_tier
from hobbit_jax.model.loading import load_model
from hobbit_jax.record import machine

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_LOW_FORMAT = flags.DEFINE_string("low_format", "Q2_K", "of the low tier")
_BUDGETS_MIB = flags.DEFINE_list("budgets_mib", ["1", "2", "4", "5"], "expert pools")
_LOW_SHARES = flags.DEFINE_list(
    "low_shares", ["0.5", "0.8"], "of the pool for low copies; 0 to 1, or adaptive"
)
_TURNS = flags.DEFINE_integer("turns", 6, "rows decoded under each setting, after a warm-up", 2)
_LINK_GB_S = flags.DEFINE_string(
    "link_gb_s", None, "bandwidth of an emulated link, or card: copies as dear as on a 12 GB card"
)
_PROMPT, _TOKENS = 32, 64
_OUT = flags.DEFINE_string("out", None, "JSON file", required=True)


def main(_):
    model = load_model(_MODEL.value or reference.model_path())
    low = open_tier(model.file, model.config, TierSpec(_LOW_FORMAT.value), low_precision_folder())
    store = HostExperts(model.config, model.file, [low])
    rows = []

    def record(row):
        rows.append(row)
        print(json.dumps(row), flush=True)

    texts = reference.held_out_texts("evaluation")
    context = _PROMPT + _TOKENS - 1
    ids_RS = quality.cut_windows(model.tokenizer(), texts, _TURNS.value + 1, context, seed=1).ids_WS
    link_gb_s = None if _LINK_GB_S.value in (None, "card") else float(_LINK_GB_S.value)
    if _LINK_GB_S.value == "card":
        derived = decode_bench.card_link(model, store, ids_RS, _PROMPT)
        record({"setting": "link", **derived})
        link_gb_s = derived["gb_s"]
    link = (DirectLink() if link_gb_s is None else PacedLink(link_gb_s)).describe()
    for budget_mib in map(float, _BUDGETS_MIB.value):
        budget = int(budget_mib * 2**20)
        groups = [decode_bench.mode_settings(store, budget, map(low_share, _LOW_SHARES.value))]
        if link_gb_s is not None:
            groups.append(decode_bench.prefetch_settings(store, budget))
        for listed in groups:
            total = (1 + len(listed)) * len(ids_RS)
            with tqdm(total=total, desc=f"{budget_mib:g} MiB", leave=False) as bar:
                measured = decode_bench.compare(
                    model, store, listed, ids_RS, _PROMPT, link_gb_s, bar.update
                )
            names = ["all resident", *(setting.name for setting in listed)]
            for name, result in zip(names, measured, strict=True):
                row = {"setting": name, "budget_mib": budget_mib, "link": link}
                record({**row, **result.figures(measured[1])})
    write_json(Path(_OUT.value), {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
