"""Decode speeds that others report, and what the cost model says of them, untuned.

`reports.json` has the reports. The constants are `cost_model.py`'s for a compiled engine with the
bandwidths of the reported machine, and none of them was changed after it was held against a report,
so a miss stays a miss. A referee chose some reports against this model and proposed what a compiled
engine's constants should be, knowing those reports; the group "found since" came after that, and
all that said enough to be forecast were kept. They are third-party figures of mixed trust.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, Literal

from hobbit_jax.planner.candidates import NATIVE
from hobbit_jax.planner.cost_model import COMPILED, Machine, Traffic, by_engine, token_time
from hobbit_jax.planner.hardware import find_gpu
from hobbit_jax.planner.routing import synthetic_routing
from hobbit_jax.planner.shapes import PlannedModel, preset_model
from hobbit_jax.planner.traffic import all_on_cpu, hot_on_device, replay_setting
from hobbit_jax.record import Benchmark, Record, machine, measured

CONTEXT = 4096
# Pairs of reports whose order must be right differ by more.
APART = 1.25


@dataclass(frozen=True)
class Report:
    """One reported speed.

    `placement` is of the experts, with its `amount`: so many layers computed on the CPU
    (--n-cpu-moe), so many GB of hot ones on the GPU for good and the others computed on the CPU, an
    LRU cache of so many GB whose misses are copied to it, such a cache with this hit rate, or no
    GPU at all.
    """

    group: str  # who chose it, and when
    model: str  # a preset
    gpu: str  # by `find_gpu`
    placement: Literal["layers_on_cpu", "hot_gb", "cache_gb", "hit_rate", "no_gpu"]
    amount: float
    tokens_per_second: float  # as reported, one sequence
    source: str  # where, and what is unsure
    host_gb_s: float | None = None  # of the host's memory, nominal; None where it was not said
    file_gb: float | None = None  # of the file, 1e9 bytes, where it is not the preset's

    @property
    def what(self) -> str:
        """In a few words."""
        size = f", {self.file_gb:g} GB" if self.file_gb else ""
        amount = "" if self.placement == "no_gpu" else f" {self.amount:g}"
        return f"{self.model}{size}, {self.gpu}, {self.placement.replace('_', ' ')}{amount}"


def read_reports() -> list[Report]:
    """All of them."""
    return [Report(**row) for row in _package_json("reports.json")]


def recorded_check() -> dict[str, Any]:
    """The summary of the comparison as it was last made."""
    return _package_json("check.json")


def _package_json(name: str) -> Any:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def forecast(report: Report) -> float:
    """Tokens a second that the cost model gives; the geometric mean over localities of routing."""
    gpu = find_gpu(report.gpu)
    host = {} if report.host_gb_s is None else {"host_gb_s": report.host_gb_s}
    machine = by_engine(Machine(gpu.device_gb_s, gpu.pcie_gb_s, **host))[COMPILED]
    model = preset_model(report.model)
    # Experts of another file are as the preset's, and all of them larger or smaller alike.
    scale = 1.0
    if report.file_gb is not None:
        scale = (report.file_gb * 1e9 - model.dense_bytes) / model.native_bytes
    names, speeds = ("expert_bytes", "host_bytes", "moved_bytes"), []
    for traffic in _traffics(report, model, scale):
        scaled = replace(traffic, **{name: scale * getattr(traffic, name) for name in names})
        speeds.append(token_time(scaled, machine).tokens_per_second)
    return geometric_mean(speeds)


def _traffics(report: Report, model: PlannedModel, scale: float) -> list[Traffic]:
    """One for each locality that matters, of the preset's own experts."""
    n_layers, k, amount = model.config.n_layers, model.config.experts_per_token, report.amount
    if report.placement == "layers_on_cpu":
        return [all_on_cpu(model, CONTEXT, n_layers - int(amount))]
    if report.placement == "no_gpu":
        traffic = all_on_cpu(model, CONTEXT)
        read = traffic.host_bytes + traffic.dense_bytes
        return [replace(traffic, dense_bytes=0, host_bytes=read, host_layers=0, layers=0)]
    if report.placement == "hit_rate":  # of every selection by itself
        resident = all_on_cpu(model, CONTEXT, n_layers)
        missing = replace(
            resident, selections=k * n_layers, exits=n_layers * (1 - amount**k),
            moved_experts=(1 - amount) * k * n_layers,
            moved_bytes=(1 - amount) * resident.expert_bytes,
        )  # fmt: skip
        return [missing]
    pool, traces = round(amount * 1e9 / scale), [r.trace for r in synthetic_routing(model.config)]
    if report.placement == "hot_gb":
        return [hot_on_device(model, trace, pool, CONTEXT)[1] for trace in traces]
    replays = (replay_setting(NATIVE, model, t, pool, CONTEXT, "float16") for t in traces)
    return [replay.traffic for replay in replays]


def compare_reports() -> dict[str, Any]:
    """Each report with its forecast and their ratio, the errors' summary, and the pairs.

    The error of a forecast is |forecast / report - 1|. Pairs are of one model, and a ranking is
    right if the forecasts are in the reports' order.
    """
    rows = []
    for report in read_reports():
        predicted, reported = forecast(report), report.tokens_per_second
        host = "assumed" if report.host_gb_s is None else "as reported"
        rows.append({
            "what": report.what, "model": report.model, "group": report.group,
            "source": report.source, "host_bandwidth": host, "reported": reported,
            "predicted": predicted, "ratio": predicted / reported,
        })  # fmt: skip
    pairs = [
        (a, b)
        for a, b in combinations(sorted(rows, key=lambda row: row["reported"]), 2)
        if a["model"] == b["model"] and b["reported"] > APART * a["reported"]
    ]
    wrong = [f"{a['what']} < {b['what']}" for a, b in pairs if a["predicted"] >= b["predicted"]]
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["group"], []).append(abs(row["ratio"] - 1))
    return {
        "rows": rows,
        "summary": {
            "reports": len(rows),
            "median_error": median(chain(*errors.values())),
            "pairs": len(pairs),
            "pairs_in_order": len(pairs) - len(wrong),
        },
        "median_errors": {group: median(own) for group, own in errors.items()},
        "wrong_pairs": wrong,
    }


def reports_record(compared: Mapping[str, Any]) -> Record:
    """The record of what `compare_reports` found."""
    asked = Benchmark("planner reports", {"reports": len(compared["rows"])})
    return Record("planner", asked, **vars(measured(compared)), **machine())
