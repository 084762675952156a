"""Decode speeds that others report, and what the cost model says of them, untuned.

Owns the list. The constants are `cost_model.py`'s for a compiled engine with the bandwidths of the
reported machine, and none of them was changed after it was held against a report, so a miss stays a
miss. A referee chose some reports against this model and proposed what a compiled engine's
constants should be, knowing those reports; the last group was found after that, and all that said
enough to be forecast were kept. They are third-party figures of mixed trust.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from hobbit_jax.planner.candidates import NATIVE
from hobbit_jax.planner.cost_model import COMPILED, Machine, Traffic, of_engine, token_time
from hobbit_jax.planner.hardware import find_gpu
from hobbit_jax.planner.routing import synthetic_routing
from hobbit_jax.planner.shapes import PlannedModel, preset_model
from hobbit_jax.planner.traffic import all_on_cpu, hot_on_device, replay_setting

CONTEXT = 4096
# Pairs of reports whose order must be right differ by more.
APART = 1.25


@dataclass(frozen=True)
class OnCPU:
    """The experts of so many layers are computed on the CPU (--n-cpu-moe)."""

    layers: int


@dataclass(frozen=True)
class HotOnGPU:
    """So many GB of the most used experts on the GPU for good, the others computed on the CPU."""

    gb: float


@dataclass(frozen=True)
class Streamed:
    """Experts in an LRU cache on the GPU, misses copied to it: its GB, or the hit rate reported."""

    gb: float = 0.0
    hit_rate: float | None = None


@dataclass(frozen=True)
class AllOnCPU:
    """No GPU: the dense part is read from the host's memory too."""


Placement = OnCPU | HotOnGPU | Streamed | AllOnCPU
ON_GPU = OnCPU(0)


@dataclass(frozen=True)
class Report:
    """One reported speed.

    Attributes:
        model: a preset.
        placement: of the experts.
        gpu: by `find_gpu`.
        tokens_per_second: as reported, one sequence.
        source: where, and what is unsure.
        host_gb_s: of the host's memory, nominal, as reported; None where it was not said.
        file_gb: of the file, 1e9 bytes, where it is not the preset's.
    """

    model: str
    placement: Placement
    gpu: str
    tokens_per_second: float
    source: str
    host_gb_s: float | None = None
    file_gb: float | None = None

    @property
    def what(self) -> str:
        """In a few words."""
        where = type(self.placement).__name__
        inner = ", ".join(f"{k} {v:g}" for k, v in vars(self.placement).items() if v is not None)
        size = f", {self.file_gb:g} GB" if self.file_gb else ""
        return f"{self.model}{size}, {self.gpu}, {where}({inner})"


_QWEN, _QWEN3, _GLM = "qwen3.6-35b-a3b", "qwen3-30b-a3b", "glm-4.7-flash"
_MIXTRAL, _CODER = "mixtral-8x7b", "qwen3-coder-next-80b"
_OSS, _OSS_120B = "gpt-oss-20b", "gpt-oss-120b"
REPORTS = {
    "a referee's": (
        Report(_QWEN, OnCPU(40), "RTX 3060", 42.3, "thecodacus/llama.cpp pull request 5"),
        Report(_QWEN, HotOnGPU(9.0), "RTX 3060", 51.3, "the same"),
        Report(_QWEN, Streamed(12.8), "RTX 5060 Ti", 62, "truespar/paddock issue 8; GB are ours"),
        Report(_QWEN, OnCPU(14), "RTX 5060 Ti", 40, "compiledthoughts.dev; layers are ours",
               96, 20),
        Report(_QWEN3, Streamed(hit_rate=0.887), "RTX 5090", 25.0, "kekzl/imp pull request 1365; "
               "GPU not named"),
        Report(_QWEN3, ON_GPU, "RTX 5090", 311, "the same"),
        Report(_MIXTRAL, AllOnCPU(), "RTX 3090", 5, "ggml-org/llama.cpp issue 4729; DDR4", 51.2),
        Report(_MIXTRAL, OnCPU(4), "RTX 3090", 24, "the same; 28 of 32 layers on the GPU", 51.2),
        Report(_MIXTRAL, Streamed(8.5), "RTX 3060", 2.5, "arXiv 2312.17238: 2 to 3, in Python; "
               "GB are ours", None, 17),
        Report(_QWEN3, ON_GPU, "320,63", 100, "ai-manual.ru: RX 9060 XT, IQ2_XXS; low trust",
               None, 8.5),
        Report(_QWEN3, OnCPU(9), "320,63", 20, "the same, Q4_K_M that spills; layers are ours"),
    ),
    "listed before": (
        Report(_QWEN, OnCPU(40), "RTX 4070", 34.6, "dev.to/kenimo49; Qwen3.5, WSL2"),
        Report(_QWEN, OnCPU(40), "RTX 5080", 51.0, "r/LocalLLaMA 1rei65v; Qwen3.5", 76.8),
        Report(_QWEN, OnCPU(24), "RTX 5080", 69.6, "the same", 76.8),
        Report(_QWEN3, OnCPU(36), "RTX 2080", 36.7, "AlexsJones/llmfit pull request 755", 102),
    ),
    "found since": (
        Report(_GLM, OnCPU(46), "RTX 3060", 32.1, "thecodacus/llama.cpp pull request 5"),
        Report(_GLM, HotOnGPU(10.0), "RTX 3060", 46.3, "the same"),
        Report(_OSS, OnCPU(2), "RTX 3060", 64, "smeltcore.com, gpt-oss-20b on an RTX 3060"),
        Report(_OSS, ON_GPU, "RTX 4090", 225, "dev.to/jovan_chan, gpt-oss-20b"),
        Report(_OSS_120B, OnCPU(36), "RTX 3090", 25.6, "gokawiil.com/article/74814: i9-14900K, "
               "GPU not named"),
        Report(_OSS_120B, OnCPU(27), "RTX 3090", 1.6, "hardware-corner.net: a file that fills the "
               "host's 64 GB"),
        Report(_CODER, OnCPU(48), "1792,63", 58.9, "loftllc.dev: RTX PRO 6000, 12 channels of "
               "DDR5-6400, IQ4_NL", 614, 44.9),
        Report(_CODER, ON_GPU, "1792,63", 85.4, "the same", 614, 44.9),
        Report(_QWEN, ON_GPU, "RTX 5090", 214, "zenn.dev/toki_mwc; Qwen3.5"),
        Report(_QWEN, ON_GPU, "896,63", 121, "magnus919.com: RTX 5070 Ti", None, 10.88),
        Report(_QWEN3, AllOnCPU(), "RTX 3060", 10.6, "inventivehq.com: i7-8700, no GPU", 42.7),
    ),
}  # fmt: skip


def forecast(report: Report) -> float:
    """Tokens a second that the cost model gives; the geometric mean over localities of routing."""
    gpu = find_gpu(report.gpu)
    host = {} if report.host_gb_s is None else {"host_gb_s": report.host_gb_s}
    machine = of_engine(Machine(gpu.device_gb_s, gpu.pcie_gb_s, **host), COMPILED)
    model = preset_model(report.model)
    # Experts of another file are as the preset's, and all of them larger or smaller alike.
    scale = 1.0
    if report.file_gb is not None:
        scale = (report.file_gb * 1e9 - model.dense_bytes) / model.native_bytes
    speeds = []
    for traffic in _traffics(report.placement, model, scale):
        scaled = {
            name: scale * getattr(traffic, name)
            for name in ("expert_bytes", "host_bytes", "moved_bytes")
        }
        speeds.append(token_time(replace(traffic, **scaled), machine).tokens_per_second)
    return math.exp(sum(map(math.log, speeds)) / len(speeds))


def _traffics(placement: Placement, model: PlannedModel, scale: float) -> list[Traffic]:
    """One for each locality that matters, of the preset's own experts."""
    traces = [routing.trace for routing in synthetic_routing(model.config)]
    match placement:
        case OnCPU(layers):
            return [all_on_cpu(model, CONTEXT, model.config.n_layers - layers)]
        case AllOnCPU():
            traffic = all_on_cpu(model, CONTEXT)
            all_bytes = traffic.host_bytes + traffic.dense_bytes
            return [replace(traffic, dense_bytes=0, host_bytes=all_bytes, host_layers=0, layers=0)]
        case HotOnGPU(gb):
            pool = round(gb * 1e9 / scale)
            return [hot_on_device(model, trace, pool, CONTEXT)[1] for trace in traces]
        case Streamed(gb, None):
            pool = round(gb * 1e9 / scale)
            return [
                replay_setting(NATIVE, model, trace, pool, CONTEXT, "float16").traffic
                for trace in traces
            ]
        case Streamed(_, float(hit_rate)):
            return [_missing(all_on_cpu(model, CONTEXT, model.config.n_layers), model, hit_rate)]
        case _:
            raise RuntimeError(f"no forecast of {placement}")


def _missing(resident: Traffic, model: PlannedModel, hit_rate: float) -> Traffic:
    """Traffic of an all-resident model, where so many selections (0-1) are there independently."""
    k, n_layers = model.config.experts_per_token, model.config.n_layers
    return replace(
        resident,
        selections=k * n_layers,
        exits=n_layers * (1 - hit_rate**k),
        moved_experts=(1 - hit_rate) * k * n_layers,
        moved_bytes=(1 - hit_rate) * resident.expert_bytes,
    )


def compare_reports() -> dict[str, Any]:
    """Each report with its forecast and their ratio, the errors' summary, and the pairs.

    The error of a forecast is |forecast / report - 1|. Pairs are of one model, and a ranking is
    right if the forecasts are in the reports' order.
    """
    rows = [
        {
            "what": report.what,
            "model": report.model,
            "group": group,
            "source": report.source,
            "host_bandwidth": "assumed" if report.host_gb_s is None else "as reported",
            "reported": report.tokens_per_second,
            "predicted": (predicted := forecast(report)),
            "ratio": predicted / report.tokens_per_second,
        }
        for group, reports in REPORTS.items()
        for report in reports
    ]
    pairs = [
        (a, b)
        for a, b in combinations(sorted(rows, key=lambda row: row["reported"]), 2)
        if a["model"] == b["model"] and b["reported"] > APART * a["reported"]
    ]
    wrong = [(a, b) for a, b in pairs if a["predicted"] >= b["predicted"]]

    def median_error(rows: list[dict[str, Any]]) -> float:
        return float(np.median([abs(row["ratio"] - 1) for row in rows]))

    return {
        "rows": rows,
        "median_error": median_error(rows),
        "median_errors": {
            group: median_error([row for row in rows if row["group"] == group]) for group in REPORTS
        },
        "pairs": len(pairs),
        "pairs_in_order": len(pairs) - len(wrong),
        "wrong_pairs": [f"{a['what']} < {b['what']}" for a, b in wrong],
    }
