"""Counts what promotion's margin, the pool's division and a warm start come to; rows and tables.

    python scripts/dev/residency_tables.py --out docs/residency.md

On two held-out texts: the one that the rules' constants were chosen on (calibration), and one that
they were not (evaluation). Rows go to OUT with the suffix .json after every setting; those that are
there are not decoded again, so it can be interrupted. A quarter of an hour on 2 CPU cores.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import residency_counts
from absl import flags
from tqdm import tqdm

from hobbit_jax import cli, reference
from hobbit_jax.atomic import replacing, write_json
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals import decode_bench, quality
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.importance.calibration import count_routing
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.record import machine
from pallas_kernels.backends import for_quality

_MODEL = flags.DEFINE_string(
    "model", None, "GGUF file of the model; the shipped reference model by default."
)
_LOW_FORMAT = flags.DEFINE_string("low_format", "Q2_K", "Format of the low-precision experts.")
_BUDGETS_MIB = flags.DEFINE_list(
    "budgets_mib", ["2", "5"], "Sizes of the expert pool in MiB, above 0."
)
_ROWS = flags.DEFINE_integer(
    "rows", 5, "Number of rows of text under each setting; counts begin at the second.", 2, 10_000
)
_OUT = flags.DEFINE_string("out", None, "Markdown file to write.", required=True)
_PROMPT, _TOKENS, _SEEDS = 32, 64, (0, 1, 2)
_PARTS: tuple[reference.Part, ...] = ("calibration", "evaluation")

_INTRODUCTION = """\
# Promotion, the pool's division and a warm start, in counts

The reference model on two held-out texts, {low} as its low precision, rows of {tokens} decoded
tokens; nothing here is a time. Every setting of a budget has the same pool bytes and decodes the
same tokens. *Residents* are (layer, expert) pairs with any copy on the device at the end,
*degraded* the selections that a low copy served, KL is to the native model. Constants were chosen
on "calibration".

    python scripts/dev/residency_tables.py --budgets_mib {budgets} --out {out}
"""


class _Rows:
    """The rows of one JSON file, by text, budget, group and setting."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings, self.done = path, settings, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["settings"] != settings:
                raise ValueError(f"{path} has rows of other settings; give another --out")
            self.done = {self._key(row): row for row in known["rows"]}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple:
        return tuple(row[name] for name in ("text", "budget_mib", "group", "setting"))

    def need(self, where: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Has the row of `where`, if it must by measuring."""
        if self._key(where) in self.done:
            return
        self.done[self._key(where)] = {**where, **measure()}
        rows = list(self.done.values())
        write_json(self.path, {"settings": self.settings, "machine": machine(), "rows": rows})

    def of(self, group: str) -> list[dict[str, Any]]:
        return [row for row in self.done.values() if row["group"] == group]


def main(_):
    out = cli.output_file("out", str(_OUT.value))
    budgets_mib = cli.numbers(_BUDGETS_MIB, float, 2**-20, cli.MAX_MIB)
    model = load_model(_MODEL.value or reference.model_path(), for_quality(None))
    low = open_low_precision(
        model.file, model.config, LowPrecisionSpec(_LOW_FORMAT.value), low_precision_folder()
    )
    store = HostExperts(model.config, model.file, [low])
    native = HostExperts(model.config, model.file)
    settings = {"model_sha256": model.file.sha256(), "low": _LOW_FORMAT.value, "rows": _ROWS.value}
    rows = _Rows(out.with_suffix(".json"), settings)

    def windows(part: reference.Part, count: int, context: int, seed: int) -> quality.Windows:
        texts = reference.held_out_texts(part)
        return quality.cut_windows(model.tokenizer(), texts, count, context, seed)

    def profile(part: reference.Part) -> np.ndarray:
        return count_routing(Engine(model, native), windows(part, 48, 512, 0)).selections_LE

    profiles = {part: profile(part) for part in _PARTS}
    for part in _PARTS:
        ids_RS = windows(part, _ROWS.value, _PROMPT + _TOKENS - 1, 1).ids_WS
        for budget_mib in budgets_mib:
            budget = int(budget_mib * 2**20)
            groups = {
                "promotion": residency_counts.promotion_settings(store, budget),
                "split": residency_counts.split_settings(budget),
            }
            for group, listed in groups.items():
                for name, setting in tqdm(
                    list(listed), f"{part}, {budget_mib:g} MiB, {group}", disable=None
                ):

                    def decode(setting=setting, ids_RS=ids_RS):
                        measured = decode_bench.compare(model, store, [setting], ids_RS, _PROMPT)
                        return residency_counts.counts(measured[1])

                    where = {"text": part, "budget_mib": budget_mib, "group": group}
                    rows.need({**where, "setting": name}, decode)
            starts = list(residency_counts.warm_starts(profiles, _SEEDS))
            for name, warm in tqdm(starts, f"{part}, {budget_mib:g} MiB, warm", disable=None):

                def begin(warm=warm, budget=budget, ids_RS=ids_RS):
                    return residency_counts.first_misses(model, native, budget, warm, ids_RS)

                where = {"text": part, "budget_mib": budget_mib, "group": "warm"}
                rows.need({**where, "setting": name}, begin)
    tables = {
        "promotion": ("Promotion", residency_counts.counts_table),
        "split": ("The share of the pool for low copies", residency_counts.counts_table),
        "warm": ("Before the first token", residency_counts.warm_table),
    }
    budgets = ",".join(_BUDGETS_MIB.value)
    text = _INTRODUCTION.format(low=_LOW_FORMAT.value, tokens=_TOKENS, budgets=budgets, out=out)
    for group, (heading, table) in tables.items():
        text += "\n".join(["", f"## {heading}", "", *table(rows.of(group)), ""])
    with replacing(out) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"the tables: {out}")


if __name__ == "__main__":
    cli.run(main)
