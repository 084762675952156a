"""Times miss modes, uniform quants and prefetch against native experts at equal bytes.

    python scripts/bench_decode.py --workdir out/decode [--model M.gguf] [--budgets_mib 1,2,all] \\
        [--settings fetch:Q2_K,fetch_low:Q2_K:0.8,floor]
    python scripts/bench_decode.py --workdir out/scale --preset qwen3-30b-a3b --budgets_mib 4096

A setting is MISS_MODE, MISS_MODE:FORMAT or MISS_MODE:FORMAT:SHARE, as --miss_mode, --low_format and
--low_share of generate.py have them; native experts under fetch come first at every budget. Writes
a record of each setting and prints a table of all that are in --workdir. A setting that does not
fit is named and left out.

A --preset is a synthetic model of a real one's size, written into --workdir when it is not there
(18.6 GB for qwen3-30b-a3b); it decodes random tokens. On a CPU a copy costs next to nothing:
--link_gb_s emulates a slower link, and the records say so. Decode is then timed by the processor's
time and the waits for the link, so that other load does not show.
"""

import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli
from hobbit_jax.cache.link import ProcessorTime, ThrottledLink
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, low_share
from hobbit_jax.engine_flags import ALL, EngineOptions, budget_mib, engine_flags
from hobbit_jax.evals.engine_program import decode, token_rows
from hobbit_jax.models.presets import PRESETS
from hobbit_jax.record import Benchmark, Record, machine, measured, read_records, write_record
from hobbit_jax.report.table import Column, table
from hobbit_jax.synthetic.synthesize import synthesize
from pallas_kernels.formats import FORMATS

STUDY, NATIVE = "decode_settings", "native"
_LATENCY_US = 10.0  # of an upload on an emulated link


def setting(text: str) -> tuple[str, dict[str, Any]]:
    """One of --settings, and the engine's options that it means.

    Raises:
        ValueError: no such mode, format or share.
    """
    mode, *low = text.split(":")
    if mode not in MISS_MODES or len(low) > 2 or not set(FORMATS).issuperset(low[:1]):
        raise ValueError(f"got {text!r}; want MISS_MODE[:FORMAT[:SHARE]]")
    share = low_share(low[1]) if low[1:] else DEFAULT_LOW_SHARE
    return text, {"miss_mode": mode, "low_format": low[0] if low else None, "low_share": share}


ENGINE = engine_flags(
    "model", "implementation", "threads", "policy", "link_to_host", "resident_lift", "prefetch",
    "chunk_tokens", "kv_format",
)  # fmt: skip
_PRESET = flags.DEFINE_enum(
    "preset", None, list(PRESETS), "Model of whose shapes a synthetic file is taken."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the records.", required=True)
_BUDGETS_MIB = cli.define_list(
    "budgets_mib", budget_mib, "1,2,4,5", "Sizes of the expert pool in MiB, or all."
)
_SETTINGS = cli.define_list(
    "settings",
    setting,
    ",".join(["fetch:Q2_K", *list(MISS_MODES)[1:]]),
    "Settings to measure; see above.",
)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 32, "Number of tokens to prefill.", 1, cli.MAX_COUNT
)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Number of tokens to decode.", 1, cli.MAX_COUNT)
_REPEATS = flags.DEFINE_integer(
    "repeats", 6, "Number of timed decodes, after a warm-up.", 1, 10_000
)
_LINK_GB_S = flags.DEFINE_float(
    "link_gb_s", None, "Bandwidth of an emulated link in GB/s.", 1e-6, 1e6
)
_COLUMNS = (
    Column("MiB", lambda r: r.setting.get("budget_mib", ALL), "g"),
    Column("setting", lambda r: r.setting["setting"]),
    Column("prefetch", lambda r: r.setting.get("prefetch")),
    Column("lift", lambda r: r.setting.get("resident_lift"), "g"),
    Column("slots", "slots_total"),
    Column("hit rate", "hit_rate", ".3f"),
    Column("round trips a token", "host_round_trips_per_token", ".1f"),
    Column("MB a token", "bytes_moved_per_token", ".3f", unit=1e6),
    Column("demoted", "demoted_selection_share", ".3f"),
    Column("KL", "kl_mean_nats", ".5f"),
    Column("tokens/s", "decode_tokens_per_s", ".1f", interval=True),
    Column("speedup", "speedup", ".2f", interval=True),
)


def settings(given: EngineOptions) -> Iterator[tuple[dict[str, Any], EngineOptions]]:
    """Every setting of every budget, native experts first, with what identifies its record."""
    plain = replace(given, link_to_host=None, resident_lift=0.0, prefetch=None)
    sizes = {"prompt_tokens": _PROMPT_TOKENS.value, "tokens": _TOKENS.value}
    sizes |= {"link_gb_s": _LINK_GB_S.value} if _LINK_GB_S.value is not None else {}
    for budget in _BUDGETS_MIB.value:
        native = replace(plain, budget_mib=budget)
        yield {"setting": NATIVE, **native.asked, **sizes}, native
        for name, chosen in _SETTINGS.value:
            options = replace(given, budget_mib=budget, **chosen)
            if not MISS_MODES[options.miss_mode].computes:
                options = replace(options, link_to_host=None)
            yield {"setting": name, **options.asked, **sizes}, options


def main(_) -> int:
    workdir, given = cli.output_folder("workdir", str(_WORKDIR.value)), ENGINE()
    made_up = _PRESET.value is not None
    if made_up:
        if given.model is not None:
            raise ValueError("want one of --model and --preset")
        path = workdir / f"{_PRESET.value}.gguf"
        if not path.is_file():
            synthesize(PRESETS[str(_PRESET.value)], str(_PRESET.value), path)
        given = replace(given, model=str(path))
    model, sizes = given.load_model(), (_PROMPT_TOKENS.value, _TOKENS.value)
    ids_RS = token_rows(model, _REPEATS.value + 1, sum(sizes), made_up)
    native, written = None, 0
    for asked, options in tqdm(list(settings(given)), unit="setting", leave=False, disable=None):
        is_native = asked["setting"] == NATIVE
        native = None if is_native else native  # of this budget
        executor, clock = SlotPool, time.perf_counter
        if _LINK_GB_S.value is not None:
            clock = ProcessorTime()
            link = ThrottledLink(_LINK_GB_S.value, _LATENCY_US, clock)
            executor = functools.partial(SlotPool, link=link)
        make_engine = functools.partial(options.make_engine, model, executor)
        try:
            found = decode(make_engine, ids_RS, sizes[0], clock)
        except (ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
            where = f"{asked['setting']} at {options.budget_mib or ALL} MiB"
            print(f"not measured: {where}: {error}", file=sys.stderr)
            continue
        native = found if is_native else native
        figures = measured(found.figures | (found.beside(native) if native else {}))
        write_record(workdir, Record(STUDY, Benchmark(STUDY, asked), **vars(figures), **machine()))
        written += 1
    print(table(_COLUMNS, read_records(workdir).of(STUDY)))
    return 0 if written else 1


if __name__ == "__main__":
    cli.run(main)
