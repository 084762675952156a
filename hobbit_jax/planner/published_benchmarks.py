"""Decode speeds that others report, and what the cost model says of them, untuned.

Owns the list. The constants are the defaults of `cost_model.py` with the bandwidths of the reported
machine. They were written down with these figures known and not changed after the first comparison,
so a miss stays a miss. All are of llama.cpp or a fork, whose launches and hand-overs are not ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hobbit_jax.models.presets import PRESETS
from hobbit_jax.planner.cost_model import Machine, Traffic, token_time
from hobbit_jax.planner.hardware import GPUS
from hobbit_jax.planner.plan import GIB
from hobbit_jax.planner.routing import synthetic_routing
from hobbit_jax.planner.shapes import PlannedModel, model_of_shapes, preset_model
from hobbit_jax.planner.traffic import all_on_cpu, hot_on_device


@dataclass(frozen=True)
class Report:
    """One reported speed.

    Attributes:
        what: model, flags and card.
        source: where it was reported.
        tokens_per_second: as reported, one sequence.
        card: of `hardware.GPUS`.
        host_gb_s: of the host's memory, nominal, as reported; None where it was not said.
        traffic: of a token, by `PlannedModel`'s sizes.
    """

    what: str
    source: str
    tokens_per_second: float
    card: str
    host_gb_s: float | None
    traffic: Traffic


# Qwen3.5-35B-A3B: 40 layers, hidden 2048, 256 experts of width 512, top-8, a shared expert; 34.66B
# weights are 20.49 GiB in Q4_K_M. Its layers are hybrids that we do not run; only sizes count here.
_FILE_BYTES = 20.49 * GIB
_EMBEDDING_BYTES = 248320 * 2048 * 4.5 / 8
_CONTEXT = 4096


def _qwen35() -> PlannedModel:
    """Experts of the right size, by the rule of Q4_K_M."""
    qwen3 = PRESETS["qwen3-30b-a3b"]
    config = replace(qwen3, blocks=qwen3.blocks[:40], n_experts=256, d_expert=512)
    return model_of_shapes("Qwen3.5-35B-A3B (experts)", config)


def _with_dense(traffic: Traffic, experts_bytes: float) -> Traffic:
    """Of the file, what is neither an expert nor the embedding is read for every token."""
    dense = _FILE_BYTES - experts_bytes - _EMBEDDING_BYTES
    return Traffic(**{**vars(traffic), "dense_bytes": dense, "kv_bytes": 0.0})


def reports() -> list[Report]:
    """All of them."""
    qwen35, qwen3 = _qwen35(), preset_model("qwen3-30b-a3b")
    size = qwen35.native_bytes
    # What a 12 GB card has left beside the dense part and a GiB of everything else.
    pool = int(12 * GIB - (_FILE_BYTES - size) - GIB)
    hot, hot_traffic = hot_on_device(qwen35, synthetic_routing(qwen35.config).trace, pool, _CONTEXT)
    layers = qwen35.config.n_layers
    return [
        Report(
            "Qwen3.5-35B-A3B Q4_K_M, --cpu-moe, RTX 4070 (WSL2)",
            "dev.to/kenimo49, rtx-4070-qwen-35b: 34.6 tokens/s", 34.6, "RTX 4070", None,
            _with_dense(all_on_cpu(qwen35, _CONTEXT), size),
        ),
        Report(
            "Qwen3.5-35B-A3B Q4_K_M, exps=CPU, RTX 5080",
            "r/LocalLLaMA 1rei65v (DDR5-4800, 76.8 GB/s): 51.0 tokens/s", 51.0, "RTX 5080", 76.8,
            _with_dense(all_on_cpu(qwen35, _CONTEXT), size),
        ),
        Report(
            "Qwen3.5-35B-A3B Q4_K_M, --n-cpu-moe 24, RTX 5080",
            "the same: 69.6 tokens/s", 69.6, "RTX 5080", 76.8,
            _with_dense(all_on_cpu(qwen35, _CONTEXT, layers - 24), size),
        ),
        Report(
            "Qwen3-30B-A3B Q4_K_M, --n-cpu-moe 36, RTX 2080",
            "AlexsJones/llmfit pull request 755 (four channels of DDR4, 102 GB/s): 36.7 tokens/s",
            36.7, "RTX 2080", 102.0, all_on_cpu(qwen3, _CONTEXT, qwen3.config.n_layers - 36),
        ),
        Report(
            f"Qwen3.5-35B-A3B Q4_K_M, hot experts on an RTX 3060 ({hot:.0%} of selections, "
            "by made-up routing)",
            "a community fork with a cache of hot experts: 51 tokens/s", 51.0, "RTX 3060", None,
            _with_dense(hot_traffic, size),
        ),
    ]  # fmt: skip


def compare_reports() -> list[dict[str, Any]]:
    """Each report with its prediction and their ratio."""
    rows = []
    for report in reports():
        card = GPUS[report.card]
        host = {} if report.host_gb_s is None else {"host_gb_s": report.host_gb_s}
        time = token_time(report.traffic, Machine(card.device_gb_s, card.pcie_gb_s, **host))
        rows.append(
            {
                "what": report.what,
                "source": report.source,
                "host_bandwidth": "as reported" if host else "assumed",
                "reported": report.tokens_per_second,
                "predicted": time.tokens_per_second,
                "ratio": time.tokens_per_second / report.tokens_per_second,
            }
        )
    return rows
