"""How long a sweep will take on this machine, from short measurements on its own model.

Owns the measurements and the sums over trials. One window, some decoded tokens and one encoded
expert of each recipe are measured, so that the forecast follows whatever backend runs. It leaves
out that trials differ: a small pool decodes slower than the one measured, and plans compile anew.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from hobbit_jax import reference
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.evals.engine_program import measure_engine
from hobbit_jax.experts.low_precision import dequantize
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel, load_model
from hobbit_jax.quantize import ggml, gptq
from hobbit_jax.record import CacheTrial, EvalSizes, MissModeTrial, QualityTrial
from hobbit_jax.resources import roomy_pool_bytes
from hobbit_jax.sweep.cache_trial import of_quality
from hobbit_jax.sweep.trial import Trial
from pallas_kernels.backends import for_quality

_DECODED = 8
_TASK_TOKENS = 64  # of an answer to one of the miniature tasks
# Of lm-eval's tasks: problems in all, and roughly the tokens of a prompt and of an answer. The
# examples of gsm8k_cot are run once for all problems.
_BENCHMARKS = {
    "humaneval": (164, 150, 50),
    "gsm8k": (1319, 900, 120),
    "gsm8k_cot": (1319, 100, 120),
}
_OTHER_BENCHMARK = (200, 200, 64)


def forecast_hours(
    trials: Sequence[Trial], to_encode: Mapping[tuple[str, str, str], int]
) -> dict[str, float]:
    """Hours of one worker by kind of work; what trials share is counted once.

    `to_encode` says how many low-precision copies are not there yet, by (model, format, method).
    """
    seconds: dict[str, float] = defaultdict(float)
    models: dict[str, LoadedModel] = {}
    groups: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[trial.inputs.model, trial.inputs.implementation].append(trial)
    for (path, implementation), group in groups.items():
        model = load_model(path or reference.model_path(), for_quality(implementation or None))
        models[path], speeds = model, _speeds(model, group[0].sizes.context)
        for sizes in dict.fromkeys(trial.sizes for trial in group):
            asked = [trial.asked for trial in group if trial.sizes == sizes]
            for name, value in _trials_s(asked, sizes, *speeds).items():
                seconds[name] += value
        for _, windows, calibration_windows, context in {
            (t.inputs, t.sizes.windows, t.sizes.calibration_windows, t.sizes.context) for t in group
        }:
            # The inputs of a calibration are summed up in about the time that they take to compute.
            tokens = (windows + 2 * calibration_windows) * context
            seconds["native logits and calibration"] += tokens * speeds[0]
    for (path, format, method), count in to_encode.items():
        seconds["encoding"] += count * _encode_s(models[path], format, method)
    return {name: value / 3600 for name, value in seconds.items()}


def _trials_s(
    asked: Sequence[CacheTrial | QualityTrial], sizes: EvalSizes, scored_s: float, decoded_s: float
) -> dict[str, float]:
    """Seconds that the trials of one size measure, by kind."""
    by_miss = sum(isinstance(one.plan, MissModeTrial) for one in asked)
    with_pool = [one for one in asked if isinstance(one, CacheTrial)]
    n_plans = len(asked) - len(with_pool) + len(set(map(of_quality, with_pool))) - by_miss
    # The miniature tasks' problems are answered all at a time, or by a miss mode one by one.
    tasks = 2 * _TASK_TOKENS if sizes.task_problems else 0
    together_s = tasks * (decoded_s + sizes.task_problems * scored_s)
    benchmarks_s = 0.0
    for name in sizes.benchmarks:
        problems, prompt, answer = _BENCHMARKS.get(name, _OTHER_BENCHMARK)
        each_s = prompt * scored_s + answer * decoded_s
        benchmarks_s += min(problems, sizes.benchmark_problems or problems) * each_s
    singly_s = tasks * sizes.task_problems * decoded_s
    decoded = (sizes.decode_repeats + 1) * (sizes.decode_prompt_tokens + sizes.decode_tokens)
    return {
        "quality": sizes.context
        * (scored_s * sizes.windows * n_plans + decoded_s * sizes.decoded_windows * by_miss),
        "decoding": decoded_s * decoded * len(with_pool),
        "tasks": (together_s + benchmarks_s) * n_plans + (singly_s + benchmarks_s) * by_miss,
    }


def _speeds(model: LoadedModel, context: int) -> tuple[float, float]:
    """Seconds of a token that is scored in a window of `context` tokens, and of a decoded one."""
    store = HostExperts(model.config, model.file)
    engine = Engine(model, store, CacheConfig(roomy_pool_bytes(store.precision_bytes(NATIVE))))
    prompt = max(1, context - _DECODED)
    rows = (2, prompt + _DECODED)
    ids_RS = np.random.default_rng(0).integers(0, model.config.vocab_size, rows, np.int32)
    found, _ = measure_engine(engine, ids_RS, prompt)
    return float(found.first_token_s[0]) / prompt, float(found.decode_s[0]) / _DECODED


def _encode_s(model: LoadedModel, format: str, method: str) -> float:
    """Seconds to encode all experts, from one of the middle layer."""
    config, rng = model.config, np.random.default_rng(0)
    layer = HostExperts(config, model.file).layer(NATIVE, config.n_layers // 2)
    matrices = [dequantize(tensor, 0) for tensor in (layer.gate, layer.up, layer.down)]

    def encode(weights_NK: np.ndarray) -> None:
        columns = weights_NK.shape[1]
        if method == "gptq":
            rows = rng.standard_normal((columns + 1, columns), np.float32)
            gptq.encode(weights_NK, format, rows.T @ rows)
        else:
            ggml.encode(weights_NK, format, rng.uniform(1, 2, columns))

    began = 0.0
    for _ in range(2):  # the first time compiles
        began = time.perf_counter()
        for weights_NK in matrices:
            encode(weights_NK)
    return (time.perf_counter() - began) * config.n_layers * config.n_experts
