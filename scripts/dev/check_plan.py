"""How far the planner's predictions are from decode on this machine, and from public figures.

    python scripts/dev/check_plan.py --out out/mine [--turns 6] [--link_gb_s 0.1] [--reports_only]

Decodes the reference model under 17 settings in turns, fits the cost model's constants to five of
them and predicts the other twelve (hobbit_jax/planner/check.py). plan.py prints the summary of the
last recorded check, which ships as hobbit_jax/planner/check.json. On a machine whose device is the
CPU an upload costs next to nothing, so a link is emulated. About five minutes on two quiet cores,
or half a minute for the public figures alone.
"""

from pathlib import Path

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, reference
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals import quality
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.model.loading import load_model
from hobbit_jax.planner.check import cases, check, summarise
from hobbit_jax.planner.published_benchmarks import compare_reports
from hobbit_jax.planner.records import check_record, reports_record
from hobbit_jax.planner.shapes import open_model
from hobbit_jax.record import machine, write_record

_TURNS = flags.DEFINE_integer(
    "turns", 6, "Number of rows decoded under each setting, after a warm-up.", 2, 10_000
)
_TOKENS = flags.DEFINE_integer("tokens", 48, "Number of tokens decoded of each row.", 8, 100_000)
_LINK_GB_S = flags.DEFINE_float(
    "link_gb_s", 0.1, "Bandwidth of an emulated link in GB/s; 0 copies as fast as can be.", 0.0, 1e6
)
_OUT = flags.DEFINE_string("out", None, "Folder to keep the record in.", required=True)
_REPORTS_ONLY = flags.DEFINE_bool("reports_only", False, "Whether to measure nothing here.")
_LOW_FORMAT, _PROMPT = "Q2_K", 16


def main(_):
    folder = cli.output_folder("out", _OUT.value)
    _compare_reports(folder)
    if not _REPORTS_ONLY.value:
        _measure(folder)


def _compare_reports(folder: Path) -> None:
    compared = compare_reports()
    path = write_record(folder, reports_record(compared))
    for row in compared["rows"]:
        print(
            f"{row['what']}: {row['predicted']:.1f} tokens/s predicted, {row['reported']:.1f} "
            f"reported ({row['ratio']:.2f}x)"
        )
    print(
        f"median error {compared['median_error']:.0%}; {compared['pairs_in_order']} of "
        f"{compared['pairs']} pairs in order\nthe record: {path}"
    )


def _measure(folder: Path) -> None:
    model_path = reference.model_path()
    model = load_model(model_path)
    low = open_low_precision(
        model.file, model.config, LowPrecisionSpec(_LOW_FORMAT), low_precision_folder()
    )
    store = HostExperts(model.config, model.file, [low])
    texts = reference.held_out_texts("evaluation")
    rows = _TURNS.value + 1
    windows = quality.cut_windows(model.tokenizer(), texts, rows, _PROMPT + _TOKENS.value - 1, 1)
    with tqdm(total=(1 + len(cases(_LOW_FORMAT))) * rows, disable=None) as bar:
        record = check(
            model,
            open_model(model_path),
            store,
            _LOW_FORMAT,
            windows.ids_WS,
            _PROMPT,
            _LINK_GB_S.value or None,
            bar.update,
        )
    summary = summarise(record, machine())
    path = write_record(folder, check_record(record, summary))
    times = record["times"][summary["clock"]]
    for i, row in enumerate(record["rows"]):
        role = "fitted" if row["calibrates"] else "predicted"
        print(
            f"{row['setting']:<34} {role:<9} {times['measured_ms'][i]['median']:7.2f} ms; predicted"
            f" over measured {times['ratio_counted'][i]['median']:.2f} by counts, "
            f"{times['ratio_replayed'][i]['median']:.2f} by replay"
        )
    print(f"{summary}\nthe record: {path}")


if __name__ == "__main__":
    cli.run(main)
