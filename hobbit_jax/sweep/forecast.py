"""How long a sweep will take on this machine, from short measurements on its own model.

Owns the measurements and the sums over cells. One window, some decoded tokens and one encoded
expert of each recipe are measured, so that the forecast follows whatever backend runs. It leaves
out that cells differ: a small pool decodes slower than the one measured, and plans compile anew.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hobbit_jax import quantize, reference
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.experts.low_precision import dequantize
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel, load_model
from hobbit_jax.quantize import gptq
from hobbit_jax.resources import roomy_pool_bytes
from hobbit_jax.sweep.preflight import Needs, needs
from hobbit_jax.sweep.trial import Trial
from pallas_kernels.backends import for_quality

_DECODED = 8
_TASK_TOKENS = 64  # of an answer to one of the miniature tasks
_BENCHMARK_TOKENS = 256  # of an answer to one of lm-eval's problems
_BENCHMARK_PROBLEMS = 500  # where all of a benchmark are asked


def forecast_hours(
    cells: Sequence[Trial], to_encode: Mapping[tuple[str, str, str], int]
) -> dict[str, float]:
    """Hours of one worker by kind of work; what cells share is counted once.

    Args:
        cells: those that are not finished.
        to_encode: how many low-precision copies are not there yet, by (model, format, method).
    """
    hours: dict[str, float] = defaultdict(float)
    shared: dict[tuple, float] = {}
    by_sizes: dict[tuple, list[Trial]] = defaultdict(list)
    for cell in cells:
        by_sizes[cell.inputs, cell.sizes].append(cell)
    models: dict[tuple[str, str], tuple[LoadedModel, dict[int, tuple[float, float]]]] = {}
    for (inputs, sizes), group in by_sizes.items():
        key = (inputs.model, inputs.implementation)
        if key not in models:
            path = inputs.model or reference.model_path()
            models[key] = load_model(path, for_quality(inputs.implementation or None)), {}
        model, speeds = models[key]
        if sizes.context not in speeds:
            speeds[sizes.context] = _speeds(model, sizes.context)
        window_s, token_s = speeds[sizes.context]
        wanted = [needs(cell) for cell in group]
        shared[inputs, sizes.windows, sizes.calibration_windows, sizes.context] = window_s
        for name, seconds in _cells_s(wanted, sizes, window_s, token_s).items():
            hours[name] += seconds / 3600
    for (_, windows, calibration_windows, _), window_s in shared.items():
        # The inputs of a calibration are summed up in about the time that they take to compute.
        seconds = (windows + 2 * calibration_windows) * window_s
        hours["native logits and calibration"] += seconds / 3600
    for (name, format, method), count in to_encode.items():
        model = next(model for (path, _), (model, _) in models.items() if path == name)
        hours["encoding"] += count * _encode_s(model, format, method) / 3600
    return dict(hours)


def _cells_s(
    wanted: Sequence[Needs], sizes: Any, window_s: float, token_s: float
) -> dict[str, float]:
    """Seconds that the cells of one size measure, by kind."""
    in_windows = [need for need in wanted if need.mode.low_banks == "none"]
    decoding = [need for need in wanted if need.mode.low_banks != "none"]
    plans = {(n.formats, n.method, n.through, n.low_share) for n in in_windows}
    # Plans of one share differ by score as well: no fewer than cells over budgets.
    budgets = {need.budget_mib for need in wanted}
    n_plans = max(len(plans), len(in_windows) // len(budgets))
    # The miniature tasks' problems are answered all at a time, or by a miss mode one by one.
    tasks = 2 * _TASK_TOKENS if sizes.task_problems else 0
    together_s = tasks * (token_s + sizes.task_problems * window_s / sizes.context)
    problems = sizes.benchmark_problems or _BENCHMARK_PROBLEMS
    benchmarks_s = len(sizes.benchmarks) * problems * _BENCHMARK_TOKENS * token_s
    singly_s = tasks * sizes.task_problems * token_s
    decoded = (sizes.decode_repeats + 1) * (sizes.decode_prompt_tokens + sizes.decode_tokens)
    return {
        "quality": window_s * sizes.windows * n_plans
        + token_s * sizes.decoded_windows * sizes.context * len(decoding),
        "decoding": token_s * decoded * sum(need.budget_mib is not None for need in wanted),
        "tasks": (together_s + benchmarks_s) * n_plans + (singly_s + benchmarks_s) * len(decoding),
    }


def _timed(run: Callable[[], Any]) -> float:
    """Seconds of the second run; the first compiles."""
    run()
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def _speeds(model: LoadedModel, context: int) -> tuple[float, float]:
    """Seconds of a window of `context` tokens, and of one decoded token."""
    store = HostExperts(model.config, model.file)
    engine = Engine(model, store, CacheConfig(roomy_pool_bytes(store.precision_bytes(NATIVE))))
    vocabulary = model.config.vocab_size
    ids_1T = np.random.default_rng(0).integers(0, vocabulary, (1, context), np.int32)
    window_s = _timed(lambda: engine.score(ids_1T))
    engine.start(1, context)
    decode_s = _timed(lambda: [engine.decode(ids_1T[0, :1]) for _ in range(_DECODED)][-1])
    return window_s, decode_s / _DECODED


def _encode_s(model: LoadedModel, format: str, method: str) -> float:
    """Seconds to encode all experts, from one of the middle layer."""
    config, rng = model.config, np.random.default_rng(0)
    layer = HostExperts(config, model.file).layer(NATIVE, config.n_layers // 2)
    matrices = [dequantize(tensor, 0) for tensor in (layer.gate, layer.up, layer.down)]

    def encode() -> None:
        for weights_NK in matrices:
            columns = weights_NK.shape[1]
            if method == "gptq":
                rows = rng.standard_normal((columns + 1, columns), np.float32)
                gptq.encode(weights_NK, format, rows.T @ rows)
            else:
                importance_K = None if method == "rtn" else rng.uniform(1, 2, columns)
                quantize.encode(weights_NK, format, importance_K)

    return _timed(encode) * config.n_layers * config.n_experts
