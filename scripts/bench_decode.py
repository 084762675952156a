"""Miss modes and prefetch against the native cache at equal bytes.

    python scripts/bench_decode.py --out out/decode.json [--budgets_mib 1,2,4] [--link_gb_s card]

Prints a table, with --json a line per setting, and writes all of them to --out. On a CPU a copy
costs next to nothing; --link_gb_s emulates a slower link, and every row says so: decode is then
timed by the processor's time and the waits for the link, so that other load does not show.
"""

import json
import math
from dataclasses import replace
from typing import Any

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, reference
from hobbit_jax.atomic import write_json
from hobbit_jax.cache.link import DirectLink, ThrottledLink
from hobbit_jax.cache.pool_sizing import LowShare, low_share
from hobbit_jax.engine_flags import EngineFlags, low_experts
from hobbit_jax.evals import decode_bench, quality
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.record import machine

ENGINE = EngineFlags(
    "model", "implementation", "threads", "policy", "low_format", low_format="Q2_K"
)
_BUDGETS_MIB = flags.DEFINE_list(
    "budgets_mib", ["1", "2", "4", "5"], "Sizes of the expert pool in MiB, above 0."
)
_LOW_SHARES = flags.DEFINE_list(
    "low_shares", ["0.5", "0.8"], "Shares of the pool for low copies: 0 to 1, or adaptive."
)
_TURNS = flags.DEFINE_integer(
    "turns", 6, "Number of rows decoded under each setting, after a warm-up.", 2, 10_000
)
_LINK_GB_S = flags.DEFINE_string(
    "link_gb_s",
    None,
    "Bandwidth of an emulated link in GB/s, above 0; card makes copies as dear as on a 12 GB card.",
)
_PROMPT, _TOKENS = 32, 64
_OUT = flags.DEFINE_string("out", None, "JSON file to write.", required=True)
_JSON = flags.DEFINE_bool("json", False, "Whether to print JSON lines instead of a table.")

_HEAD = f"{'setting':<44} {'MiB':>6} {'hit rate':>8} {'kB/token':>9} {'KL nats':>9} {'speedup':>8}"


def show(row: dict[str, Any]) -> str:
    """A setting's row for people; other rows are lines of their figures."""
    if "hit_rate" in row:
        return (
            f"{row['setting']:<44} {row['budget_mib']:>6g} {row['hit_rate']:>8.3f} "
            f"{row['bytes_moved_per_token'] / 1e3:>9.1f} {row['kl_nats']:>9.5f} "
            f"{row['speedup']['median']:>8.2f}"
        )
    figures = (f"{name} {value}" for name, value in row.items() if name != "setting")
    return f"{row['setting']}: {', '.join(figures)}"


def link_bandwidth() -> float | None:
    """What --link_gb_s says in figures; None for card and for no link."""
    if _LINK_GB_S.value in (None, "card"):
        return None
    try:
        gb_s = float(_LINK_GB_S.value)
    except ValueError:
        gb_s = math.nan
    if not 1e-6 <= gb_s <= 1e6:
        raise ValueError(f"--link_gb_s is {_LINK_GB_S.value!r}; want card, or 1e-06 to 1e+06")
    return gb_s


def main(_):
    out, link_gb_s = cli.output_file("out", str(_OUT.value)), link_bandwidth()
    budgets_mib = cli.numbers(_BUDGETS_MIB, float, 2**-20, cli.MAX_MIB)
    low_shares: list[LowShare] = [low_share(text) for text in _LOW_SHARES.value]
    model = ENGINE.load_model()
    low = low_experts(model, ENGINE.value("low_format"))
    store = HostExperts(model.config, model.file, [low])
    rows = []

    def record(row):
        rows.append(row)
        print(json.dumps(row) if _JSON.value else show(row), flush=True)

    texts = reference.held_out_texts("evaluation")
    context = _PROMPT + _TOKENS - 1
    ids_RS = quality.cut_windows(model.tokenizer(), texts, _TURNS.value + 1, context, seed=1).ids_WS
    if _LINK_GB_S.value == "card":
        derived = decode_bench.card_link(model, store, ids_RS, _PROMPT)
        record({"setting": "link", **derived})
        link_gb_s = derived["gb_s"]
    link = (DirectLink() if link_gb_s is None else ThrottledLink(link_gb_s)).describe()
    if not _JSON.value:
        print(_HEAD)
    for budget_mib in budgets_mib:
        budget = int(budget_mib * 2**20)
        groups = [decode_bench.mode_settings(store, budget, low_shares)]
        if link_gb_s is not None:
            groups.append(decode_bench.prefetch_settings(store, budget))
        for listed in groups:
            total = (1 + len(listed)) * len(ids_RS)
            with tqdm(total=total, desc=f"{budget_mib:g} MiB", leave=False, disable=None) as bar:
                settings = (replace(c, policy=ENGINE.value("policy")) for c in listed.values())
                measured = decode_bench.compare(
                    model, store, settings, ids_RS, _PROMPT, link_gb_s, bar.update
                )
            names = ["all resident", *listed]
            for name, result in zip(names, measured, strict=True):
                row = {"setting": name, "budget_mib": budget_mib, "link": link}
                record({**row, **result.figures(measured[1])})
    write_json(out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
