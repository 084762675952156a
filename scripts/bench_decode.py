"""Times miss modes and prefetch against the native cache at equal bytes.

    python scripts/bench_decode.py --workdir out/decode [--budgets_mib 1,2,4] [--link_gb_s card]

Prints a line a setting and writes a record of each, which report.py reads. On a CPU a copy costs
next to nothing; --link_gb_s emulates a slower link, and every record says so: decode is then timed
by the processor's time and the waits for the link, so that other load does not show.
"""

import math
from dataclasses import replace

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, reference
from hobbit_jax.cache.link import DirectLink, ThrottledLink
from hobbit_jax.cache.pool_sizing import LowShare, low_share
from hobbit_jax.engine_flags import EngineFlags, low_experts
from hobbit_jax.evals import decode_bench, quality
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.record import Benchmark, Record, machine, measured, write_record
from hobbit_jax.report.table import Column, table

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
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the records.", required=True)
_STUDY, _PROMPT, _TOKENS = "decode", 32, 64
_COLUMNS = (
    Column("setting", lambda r: r.asked.setting["setting"]),
    Column("MiB", lambda r: r.asked.setting.get("budget_mib"), "g"),
    Column("hit rate", "hit_rate", ".3f"),
    Column("kB a token", "bytes_moved_per_token", ".1f", unit=1e3),
    Column("KL", "kl_mean_nats", ".5f"),
    Column("speedup", "speedup", ".2f", interval=True),
)


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
    workdir, link_gb_s = cli.output_folder("workdir", str(_WORKDIR.value)), link_bandwidth()
    budgets_mib = cli.numbers(_BUDGETS_MIB, float, 2**-20, cli.MAX_MIB)
    low_shares: list[LowShare] = [low_share(text) for text in _LOW_SHARES.value]
    model = ENGINE.load_model()
    low = low_experts(model, ENGINE.value("low_format"))
    store, records = HostExperts(model.config, model.file, [low]), []

    def keep(setting, figures):
        found = measured(figures)
        records.append(Record(_STUDY, Benchmark(_STUDY, setting), **vars(found), **machine()))
        write_record(workdir, records[-1])

    texts = reference.held_out_texts("evaluation")
    context = _PROMPT + _TOKENS - 1
    ids_RS = quality.cut_windows(model.tokenizer(), texts, _TURNS.value + 1, context, seed=1).ids_WS
    if _LINK_GB_S.value == "card":
        derived = decode_bench.card_link(model, store, ids_RS, _PROMPT)
        keep({"setting": "link"}, derived)
        link_gb_s = derived["gb_s"]
    link = (DirectLink() if link_gb_s is None else ThrottledLink(link_gb_s)).describe()
    link = {f"link_{name}": value for name, value in link.items()}
    for budget_mib in budgets_mib:
        budget = int(budget_mib * 2**20)
        groups = {"miss modes": decode_bench.mode_settings(store, budget, low_shares)}
        if link_gb_s is not None:
            groups["prefetch"] = decode_bench.prefetch_settings(store, budget)
        for group, settings in groups.items():
            total = (1 + len(settings)) * len(ids_RS)
            with tqdm(total=total, desc=f"{budget_mib:g} MiB", leave=False, disable=None) as bar:
                caches = (replace(c, policy=ENGINE.value("policy")) for c in settings.values())
                found = decode_bench.compare(
                    model, store, caches, ids_RS, _PROMPT, link_gb_s, bar.update
                )
            names = ["all resident", *settings]
            for name, result in zip(names, found, strict=True):
                where = {"beside": group} if name == "all resident" else {}
                asked = {**where, "setting": name, "budget_mib": budget_mib, **link}
                keep(asked, result.figures(found[1]))
    print(table(_COLUMNS, records))


if __name__ == "__main__":
    cli.run(main)
